package image

import (
	"errors"
	"path/filepath"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"

	"holdfast/rafs/oci"
	"holdfast/rafs/source"
)

// Options say how images are fetched; the zero value is good.
type Options struct {
	Keychain authn.Keychain // where credentials come from; nil: the Docker configuration file and its helpers
	Stall    time.Duration  // how long a registry may send nothing; 0: source.DefaultStall
}

// A store keeps the blobs of an image: an [oci.Store], or a directory.
type store interface {
	// Blob returns the blob whose sha256, or file name, is id. id was checked to be hex.
	Blob(id string, size int64) source.Source
	Close() error
}

// openStore returns the store a reference names. Nothing is opened or fetched.
func openStore(r Reference, o Options) store {
	if r.boot != "" {
		return directory{dir: r.blobs}
	}
	return oci.Open(r.image, source.Options{Keychain: o.Keychain, Stall: o.Stall})
}

// A directory has blobs named by id, and no manifest.
type directory struct{ dir string }

func (s directory) Blob(id string, size int64) source.Source {
	return source.NewFile(filepath.Join(s.dir, id), size)
}

func (s directory) Close() error { return nil }

// readFile reads a regular file of at most limit bytes.
func readFile(path string, limit int64) ([]byte, error) {
	b, err := source.ReadFile(path, limit)
	if errors.Is(err, source.ErrTooLarge) {
		err = bad("%w", err)
	}
	return b, err
}
