package convert

import (
	"context"
	"fmt"
	"os"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"

	"holdfast/rafs"
	"holdfast/rafs/blob"
	"holdfast/rafs/bootstrap"
	"holdfast/rafs/oci"
	"holdfast/rafs/source"
	"holdfast/rafs/tree"
)

// Options say what [Run] converts, and how. Only Source and Dest must be set.
type Options struct {
	Source    string          // dir:PATH, tar:PATH, oci:PATH[:TAG] or docker://REF
	Dest      string          // oci:PATH:TAG or docker://REF
	ChunkSize uint32          // bytes, a power of two from rafs.MinChunkSize to rafs.MaxChunkSize; 0: rafs.DefaultChunkSize
	Codec     rafs.Codec      // of the chunks; none unless set
	Digest    rafs.DigestAlgo // of the chunks; blake3 unless set
	Platforms []string        // of an index convert these, "linux/arm64" for example; none: all
	Workers   int             // goroutines that compress; 0: as many as the machine has processors. Changes no byte of the result
	Prefetch  []string        // absolute paths of files and directories to be fetched first, most important first
	Progress  func(Progress)  // called about ten times a second and at the end, from one goroutine at a time; may be nil
	Keychain  authn.Keychain  // credentials for registries; nil: the Docker configuration file and its helpers

	// Dictionary are blobs of other images whose chunks are referred to instead of stored. Those that the result needs become
	// layers of it, and are stored with it where they are not there yet. All must have the ChunkSize and Digest given here.
	Dictionary []DictionaryBlob
}

// A Result is an image as it was written.
type Result struct {
	Ref       string // DEST
	Digest    string // "sha256:<hex>" of its manifest, or of its index
	MediaType string
	Images    []ImageResult
	Totals    Progress // the last one
}

// An ImageResult is the image of one platform.
type ImageResult struct {
	Platform      string          // "linux/amd64"
	Digest        string          // "sha256:<hex>" of its manifest
	Blobs         []rafs.BlobInfo // its own, and those of the dictionary that it refers to
	Dictionary    DictionaryUse
	SkippedXattrs int // extended attributes in name spaces that EROFS has no room for, left out
}

// An OptionsError is about [Options] that make no sense: nothing was read or written.
type OptionsError struct{ err error }

func (e *OptionsError) Error() string { return e.err.Error() }

// Unwrap returns the cause.
func (e *OptionsError) Unwrap() error { return e.err }

// Run converts an image. It returns once the image is stored under its tag; when it fails or ctx is cancelled, what the
// tag stood for before is untouched and temporary files are gone. Blobs that were stored before the failure may stay, as
// they may be other images' too.
func Run(ctx context.Context, o Options) (_ *Result, err error) {
	c, err := newConversion(o)
	if err != nil {
		return nil, &OptionsError{err}
	}
	defer func() {
		if err != nil {
			err = fmt.Errorf("convert %s: %w", c.o.Source, err)
		}
	}()
	images, closeSource, err := c.openSource(ctx)
	defer closeSource()
	if err != nil {
		return nil, err
	}
	if c.out, err = c.openOutput(); err != nil {
		return nil, err
	}
	defer func() {
		if e := c.out.Close(); err == nil {
			err = e
		}
	}()
	stop := c.meter.report(c.o.Progress)
	defer stop()
	return c.run(ctx, images)
}

// A conversion is one call of Run.
type conversion struct {
	o         Options
	src       location
	dst       oci.Reference
	platforms []ocispec.Platform
	out       output
	meter     *progressMeter
	dict      *blob.Dictionary // nil: none
	dictBlobs []DictionaryBlob // its blobs, in its order
}

func newConversion(o Options) (*conversion, error) {
	c := &conversion{o: o, meter: &progressMeter{}}
	var err error
	if c.src, err = parseSource(o.Source); err != nil {
		return nil, err
	}
	if c.dst, err = parseDest(o.Dest); err != nil {
		return nil, err
	}
	for _, s := range o.Platforms {
		p, err := parsePlatform(s)
		if err != nil {
			return nil, err
		}
		c.platforms = append(c.platforms, p)
	}
	if c.o.ChunkSize == 0 {
		c.o.ChunkSize = rafs.DefaultChunkSize
	}
	if n := c.o.ChunkSize; n < rafs.MinChunkSize || n > rafs.MaxChunkSize || n&(n-1) != 0 {
		return nil, fmt.Errorf("chunk size %d: want a power of two from %d to %d", n, rafs.MinChunkSize, rafs.MaxChunkSize)
	}
	if c.o.Keychain == nil {
		c.o.Keychain = authn.DefaultKeychain
	}
	return c, c.makeDictionary()
}

func (c *conversion) openOutput() (output, error) {
	if c.dst.Name != nil {
		return openPush(c.dst.Name, c.o.Keychain, &c.meter.pushed)
	}
	return openLayout(c.dst.Path, c.dst.Tag)
}

// openSource returns the images to convert, those of the platforms wanted.
func (c *conversion) openSource(ctx context.Context) ([]inputImage, func() error, error) {
	nothing := func() error { return nil }
	switch c.src.scheme {
	case "dir":
		img, err := dirImage(c.src.path)
		return []inputImage{img}, nothing, err
	case "tar":
		img, err := tarImage(c.src.path)
		return []inputImage{img}, nothing, err
	}
	s := oci.Open(c.src.image, source.Options{Keychain: c.o.Keychain})
	images, err := c.openImages(ctx, s)
	return images, s.Close, err
}

func (c *conversion) openImages(ctx context.Context, s *oci.Store) ([]inputImage, error) {
	roots, err := s.Find(ctx)
	if err != nil {
		return nil, err
	}
	refs, err := imagesOf(ctx, s, roots[0])
	if err != nil {
		return nil, err
	}
	var images []inputImage
	var others []string
	for _, ref := range refs {
		if ref.platform != nil && !wanted(*ref.platform, c.platforms) {
			others = append(others, platformString(*ref.platform))
			continue
		}
		img, err := openImage(ctx, s, ref)
		if err != nil {
			return nil, err
		}
		if !wanted(img.platform, c.platforms) {
			others = append(others, platformString(img.platform))
			continue
		}
		images = append(images, img)
	}
	if len(images) == 0 {
		return nil, fmt.Errorf("%w: none for the platforms %q, only for %q", oci.ErrNotFound, c.o.Platforms, others)
	}
	return images, nil
}

func (c *conversion) run(ctx context.Context, images []inputImage) (*Result, error) {
	c.meter.plan(images)
	res := &Result{Ref: c.o.Dest}
	var docs []document
	for i, img := range images {
		j := &imageJob{conversion: c, number: i + 1, own: len(img.layers), dedup: blob.NewDedup(c.dict, len(img.layers)+1), root: tree.NewRoot()}
		manifest, err := j.convert(ctx, img)
		if err != nil {
			return nil, err
		}
		docs = append(docs, manifest)
		res.Images = append(res.Images, ImageResult{
			Platform: platformString(img.platform), Digest: manifest.desc.Digest.String(), Blobs: j.used, Dictionary: j.dictUse, SkippedXattrs: j.skippedXattrs,
		})
	}
	root := docs[0]
	if len(docs) > 1 {
		var descs []ocispec.Descriptor
		for _, d := range docs {
			if err := c.out.putManifest(ctx, d.desc, d.body); err != nil {
				return nil, err
			}
			descs = append(descs, d.desc)
		}
		var err error
		if root, err = newIndex(descs); err != nil {
			return nil, err
		}
	}
	if err := c.out.putRoot(ctx, root.desc, root.body); err != nil {
		return nil, err
	}
	res.Digest, res.MediaType = root.desc.Digest.String(), root.desc.MediaType
	res.Totals = c.meter.snapshot()
	return res, nil
}

// An imageJob converts the image of one platform.
type imageJob struct {
	*conversion
	number        int // of the image, 1-based
	own           int // how many layers it has: its blobs are numbers 1 to own, those of the dictionary come after
	dedup         *blob.Dedup
	root          *tree.Node // the layers so far, merged
	blobs         []madeBlob // one per layer
	used          []rafs.BlobInfo
	dictUse       DictionaryUse
	skippedXattrs int
}

// convert writes everything of an image but its manifest, which it returns.
func (j *imageJob) convert(ctx context.Context, img inputImage) (document, error) {
	for i, in := range img.layers {
		j.meter.layer(j.number, i+1, len(img.layers))
		l, err := j.convertLayer(ctx, in)
		if err == nil && img.merge {
			err = merge(j.root, l)
		} else if err == nil {
			j.root = l.root
		}
		if err != nil && in.name != "" {
			err = fmt.Errorf("layer %d, %s: %w", i+1, in.name, err)
		}
		if err != nil {
			return document{}, err
		}
	}
	if err := context.Cause(ctx); err != nil {
		return document{}, err
	}
	return j.pack(ctx, img)
}

// pack writes the bootstrap layer, the blob layers that it refers to, and the configuration.
func (j *imageJob) pack(ctx context.Context, img inputImage) (document, error) {
	j.meter.phase(PhasePack)
	p, err := j.choose()
	if err != nil {
		return document{}, err
	}
	boot, err := bootstrap.Write(&bootstrap.Image{
		Root: j.root, Blobs: j.used, ChunkSize: j.o.ChunkSize, Codec: j.o.Codec, Digest: j.o.Digest, Prefetch: j.o.Prefetch,
	})
	if err != nil {
		return document{}, err
	}
	files := []packedFile{{bootstrapName, boot}}
	var layers []ocispec.Descriptor
	var diffIDs []digest.Digest
	for i, b := range j.blobs {
		if p.kept[i] {
			d := blobDescriptor(b)
			layers, diffIDs = append(layers, d), append(diffIDs, d.Digest)
			files = append(files, packedFile{d.Digest.Encoded() + blobMetaSuffix, b.meta})
		}
	}
	for _, b := range p.shared {
		d := b.descriptor()
		layers, diffIDs = append(layers, d), append(diffIDs, d.Digest)
	}
	last, lastDiff, err := bootstrapLayer(files)
	if err != nil {
		return document{}, err
	}
	config, err := rewriteConfig(img.config, append(diffIDs, lastDiff), p.kept, len(p.shared))
	if err != nil {
		return document{}, err
	}
	if err := j.put(ctx, p, last, config); err != nil {
		return document{}, err
	}
	manifest, err := newManifest(config.desc, append(layers, last.desc), img.annotations)
	manifest.desc.Platform = rafsPlatform(img.platform)
	return manifest, err
}

// A choice says which blobs an image needs.
type choice struct {
	kept   []bool           // of its own
	shared []DictionaryBlob // of the dictionary
}

// choose numbers the blobs that the merged tree refers to as the bootstrap lists them.
func (j *imageJob) choose() (p choice, err error) {
	if j.dictUse, err = j.dictionaryUse(j.root, j.own); err != nil {
		return p, err
	}
	infos := j.infos()
	m, err := mapBlobs(j.root, 0, len(infos))
	if err != nil {
		return p, err
	}
	if err := m.apply(j.root); err != nil {
		return p, err
	}
	j.used = m.pick(infos)
	for i := range j.blobs {
		p.kept = append(p.kept, m[i+1] != 0)
	}
	for i, b := range j.dictBlobs {
		if m[j.own+i+1] != 0 {
			p.shared = append(p.shared, b)
		}
	}
	return p, checkCount(len(j.used), len(j.used)-len(p.shared))
}

// put stores the blobs that are needed, up to four at once, and the documents, and removes the other blobs.
func (j *imageJob) put(ctx context.Context, p choice, docs ...document) error {
	j.meter.phase(PhaseStore)
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(4)
	for i, b := range j.blobs {
		g.Go(func() error {
			if p.kept[i] {
				return j.out.putFile(ctx, blobDescriptor(b), b.path)
			}
			return os.Remove(b.path)
		})
	}
	for _, b := range p.shared {
		g.Go(func() error { return j.out.putShared(ctx, b) })
	}
	for _, d := range docs {
		g.Go(func() error { return j.out.putBytes(ctx, d.desc, d.body) })
	}
	return g.Wait()
}
