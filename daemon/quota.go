package daemon

import (
	"sync"
	"sync/atomic"
)

// AllDomains stands in Options.DomainQuota for every domain that is not named there.
const AllDomains = ""

// quotas are what domains may take, and what they do take: counted by the culler from time to time, and in between by what is
// written.
type quotas struct {
	limit map[string]int64 // by domain; not changed

	mu   sync.RWMutex // held for a map access only
	used map[string]*atomic.Int64
}

func newQuotas(limit map[string]int64) quotas {
	return quotas{limit: limit, used: map[string]*atomic.Int64{}}
}

// of is a domain's quota, and whether it has one.
func (q *quotas) of(domain string) (int64, bool) {
	n, ok := q.limit[domain]
	if !ok {
		n, ok = q.limit[AllDomains]
	}
	return n, ok
}

func (q *quotas) counter(domain string) *atomic.Int64 {
	q.mu.RLock()
	n := q.used[domain]
	q.mu.RUnlock()
	if n != nil {
		return n
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	if n = q.used[domain]; n == nil {
		n = new(atomic.Int64)
		q.used[domain] = n
	}
	return n
}

// wrote counts what is written for a domain.
func (q *quotas) wrote(domain string, n int64) {
	if len(q.limit) > 0 {
		q.counter(domain).Add(n)
	}
}

// over reports whether a domain takes more than it may.
func (q *quotas) over(domain string) bool {
	if len(q.limit) == 0 {
		return false
	}
	n, ok := q.of(domain)
	return ok && q.counter(domain).Load() > n
}

// count sets what domains were found to take.
func (q *quotas) count(used map[string]int64) {
	for domain, n := range used {
		q.counter(domain).Store(n)
	}
}
