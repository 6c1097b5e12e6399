package convert

import (
	"context"
	"fmt"
	"os"
	"path/filepath"

	"holdfast/rafs"
	"holdfast/rafs/blob"
	"holdfast/rafs/bootstrap"
	"holdfast/rafs/tree"
)

// A madeBlob is a blob layer that has been written.
type madeBlob struct {
	path string // where it waits to be put into the output
	info rafs.BlobInfo
	size int64  // bytes of the file
	meta []byte // chunk information, to be packed beside the bootstrap
}

// A blobMap gives blobs, by their 1-based numbers, other numbers; 0 leaves a blob out.
type blobMap []int

// mapBlobs numbers the blobs that a tree refers to: own, unless it is 0, as 1, the others after it in their order. n is
// how many there are.
func mapBlobs(root *tree.Node, own, n int) (blobMap, error) {
	m := make(blobMap, n+1)
	err := eachFile(root, func(in *tree.Inode) {
		for _, c := range in.Chunks {
			m[c.Blob] = 1
		}
	})
	m[0] = 0
	next := 1
	if own > 0 {
		m[own] = 0
		next = 2
	}
	for i := range m {
		if m[i] != 0 {
			m[i] = next
			next++
		}
	}
	if own > 0 {
		m[own] = 1
	}
	return m, err
}

// apply renumbers the blobs that a tree refers to.
func (m blobMap) apply(root *tree.Node) error {
	for i, to := range m {
		if to != 0 && to != i {
			return eachFile(root, func(in *tree.Inode) {
				for k := range in.Chunks {
					in.Chunks[k].Blob = m[in.Chunks[k].Blob]
				}
			})
		}
	}
	return nil
}

// inverse is the map back.
func (m blobMap) inverse() blobMap {
	back := make(blobMap, len(m))
	for i, to := range m {
		if to != 0 {
			back[to] = i
		}
	}
	return back
}

// pick returns the blobs that m does not leave out, in their new order.
func (m blobMap) pick(blobs []rafs.BlobInfo) []rafs.BlobInfo {
	var out []rafs.BlobInfo
	for _, i := range m.inverse() {
		if i != 0 {
			out = append(out, blobs[i-1])
		}
	}
	return out
}

// after counts the blobs with numbers above own that m does not leave out.
func (m blobMap) after(own int) (n int) {
	for _, to := range m[own+1:] {
		if to != 0 {
			n++
		}
	}
	return n
}

// eachFile calls fn once for every regular file with content.
func eachFile(root *tree.Node, fn func(*tree.Inode)) error {
	seen := make(map[*tree.Inode]bool)
	return root.Walk(func(_ string, n *tree.Node) error {
		if len(n.Inode.Chunks) > 0 && !seen[n.Inode] {
			seen[n.Inode] = true
			fn(n.Inode)
		}
		return nil
	})
}

// convertLayer reads the next layer of an image into a blob beside the output. On return the layer's tree refers to
// chunks of this and earlier blobs of the image.
func (j *imageJob) convertLayer(ctx context.Context, in inputLayer) (_ *layer, err error) {
	path := filepath.Join(j.out.dir(), fmt.Sprintf("image-%d-blob-%d", j.number, len(j.blobs)+1))
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644)
	if err != nil {
		return nil, err
	}
	defer func() {
		if e := f.Close(); err == nil {
			err = e
		}
	}()
	w, err := blob.NewWriter(f, blob.Options{
		Blob: len(j.blobs) + 1, ChunkSize: j.o.ChunkSize, Codec: j.o.Codec, Digest: j.o.Digest, Workers: j.o.Workers, Dedup: j.dedup,
	})
	if err != nil {
		return nil, err
	}
	defer w.Close()
	j.meter.start(w)
	r := &layerReader{
		layer: newLayer(j.root), chunks: &chunker{w: w, chunk: uint64(j.o.ChunkSize)}, read: &j.meter.read, sparse: maxSparse,
	}
	if err := in.read(ctx, r); err != nil {
		return nil, err
	}
	if err := r.layer.finish(); err != nil {
		return nil, err
	}
	if err := r.chunks.finish(); err != nil {
		return nil, err
	}
	boot, err := j.layerBootstrap(w, r.layer.root)
	if err != nil {
		return nil, err
	}
	res, err := w.Finish(boot)
	if err != nil {
		return nil, err
	}
	j.meter.finish(res.Stats)
	j.skippedXattrs += r.skippedXattrs
	j.blobs = append(j.blobs, madeBlob{path, res.Info, res.Size, res.BlobMeta})
	return r.layer, nil
}

// layerBootstrap makes the bootstrap that a layer's blob carries: the layer alone, whiteouts as they came, this blob as
// the first one, under the placeholder id.
func (j *imageJob) layerBootstrap(w *blob.Writer, root *tree.Node) ([]byte, error) {
	own, err := w.Info()
	if err != nil {
		return nil, err
	}
	infos, n := j.infos(), len(j.blobs)+1
	infos[n-1] = own
	m, err := mapBlobs(root, n, len(infos))
	if err != nil {
		return nil, err
	}
	if err := m.apply(root); err != nil {
		return nil, err
	}
	blobs := m.pick(infos)
	if err := checkCount(len(blobs), len(blobs)-m.after(j.own)); err != nil {
		return nil, err
	}
	boot, err := bootstrap.Write(&bootstrap.Image{
		Root: root, Blobs: blobs, ChunkSize: j.o.ChunkSize, Codec: j.o.Codec, Digest: j.o.Digest,
	})
	if err != nil {
		return nil, err
	}
	return boot, m.inverse().apply(root)
}

// infos describes the image's own blobs, those that are not written yet by nothing, and the dictionary's.
func (j *imageJob) infos() []rafs.BlobInfo {
	infos := make([]rafs.BlobInfo, j.own, j.own+len(j.dictBlobs))
	for i, b := range j.blobs {
		infos[i] = b.info
	}
	for _, b := range j.dictBlobs {
		infos = append(infos, b.Info)
	}
	return infos
}
