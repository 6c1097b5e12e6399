package daemon

import (
	"cmp"
	"net/http"
	"slices"

	"holdfast/fscache"
)

// A Sharing is the answer to GET /v1/dedup: what the mounted images have in common. Sizes are bytes.
type Sharing struct {
	Host    SharingSums     `json:"host"`
	Domains []DomainSharing `json:"domains"`
	Images  []ImageSharing  `json:"images"`
}

// SharingSums are over a number of images.
type SharingSums struct {
	Images    int   `json:"images"`    // an image in two domains is two
	Objects   int   `json:"objects"`   // of their blobs
	Size      int64 `json:"size"`      // of the objects
	Shared    int64 `json:"shared"`    // of that, objects that several images refer to
	Saved     int64 `json:"saved"`     // what the cache would hold once more for each further image if every image had objects of its own
	Copied    int64 `json:"copied"`    // of chunks that another object had, instead of being fetched; since the object was first mounted, or the daemon started
	Reflinked int64 `json:"reflinked"` // of that, what shares its space on disk with where it was copied from (not in Saved)
}

// A DomainSharing is about one domain.
type DomainSharing struct {
	Domain string `json:"domain"`
	SharingSums
}

// An ImageSharing is about one image in one domain, however often it is mounted there.
type ImageSharing struct {
	Digest    string `json:"digest"`
	Ref       string `json:"ref"` // of one of the mounts
	Domain    string `json:"domain"`
	Size      int64  `json:"size"`   // of its objects
	Shared    int64  `json:"shared"` // of that, objects that other images of the domain refer to too
	Copied    int64  `json:"copied"` // into its objects, as in SharingSums
	Reflinked int64  `json:"reflinked"`
}

// sharing describes what the mounted images have in common.
func (d *Daemon) sharing() Sharing {
	type mounted struct{ digest, domain string }
	images, domains := map[mounted]*mount{}, map[string]*SharingSums{}
	users := map[*object]int{} // images that refer to it
	for _, m := range d.mounts.list() {
		k := mounted{m.record.Image, m.record.Domain}
		if images[k] != nil || m.broken != "" {
			continue
		}
		images[k] = m
		if domains[k.domain] == nil {
			domains[k.domain] = &SharingSums{}
		}
		domains[k.domain].Images++
		for _, o := range m.objects() {
			users[o]++
		}
	}
	for o, n := range users {
		domains[o.key.Domain].add(o, n)
	}
	s := Sharing{Domains: []DomainSharing{}, Images: []ImageSharing{}}
	for name, sums := range domains {
		s.Domains = append(s.Domains, DomainSharing{name, *sums})
		s.Host.Images += sums.Images
		s.Host.Objects += sums.Objects
		s.Host.Size += sums.Size
		s.Host.Shared += sums.Shared
		s.Host.Saved += sums.Saved
		s.Host.Copied += sums.Copied
		s.Host.Reflinked += sums.Reflinked
	}
	for k, m := range images {
		i := ImageSharing{Digest: k.digest, Ref: m.record.Ref, Domain: k.domain}
		for _, o := range m.objects() {
			i.Size += o.size()
			i.Copied += o.copied.Load()
			i.Reflinked += o.reflinked.Load()
			if users[o] > 1 {
				i.Shared += o.size()
			}
		}
		s.Images = append(s.Images, i)
	}
	slices.SortFunc(s.Domains, func(a, b DomainSharing) int { return cmp.Compare(a.Domain, b.Domain) })
	slices.SortFunc(s.Images, func(a, b ImageSharing) int {
		return cmp.Or(cmp.Compare(a.Domain, b.Domain), cmp.Compare(a.Ref, b.Ref), cmp.Compare(a.Digest, b.Digest))
	})
	return s
}

// add counts an object that n images of the domain refer to.
func (s *SharingSums) add(o *object, n int) {
	s.Objects++
	s.Size += o.size()
	s.Copied += o.copied.Load()
	s.Reflinked += o.reflinked.Load()
	if n > 1 {
		present, _ := o.presentBytes()
		s.Shared += o.size()
		s.Saved += int64(n-1) * present
	}
}

// objects are those of m's blobs, each once.
func (m *mount) objects() (list []*object) {
	seen := map[fscache.Key]bool{}
	for _, h := range m.blobs {
		if !seen[h.o.key] {
			seen[h.o.key] = true
			list = append(list, h.o)
		}
	}
	return list
}

func (d *Daemon) getDedup(r *http.Request) (int, any, error) {
	return http.StatusOK, d.sharing(), noQuery(r)
}
