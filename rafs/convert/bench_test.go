package convert

import (
	"archive/tar"
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"holdfast/rafs"
)

// benchTar returns a tar of about 300 MB of this machine's /usr/lib, or the file that HOLDFAST_BENCH_TAR names.
func benchTar(b *testing.B) string {
	b.Helper()
	if p := os.Getenv("HOLDFAST_BENCH_TAR"); p != "" {
		return p
	}
	path := filepath.Join(b.TempDir(), "bench.tar")
	f, err := os.Create(path)
	if err != nil {
		b.Fatal(err)
	}
	defer f.Close()
	w := tar.NewWriter(f)
	full := errors.New("enough")
	size := int64(0)
	err = filepath.WalkDir("/usr/lib", func(p string, d os.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		body, err := os.ReadFile(p)
		if err != nil {
			return err
		}
		if size += int64(len(body)); size > 300<<20 {
			return full
		}
		if err := w.WriteHeader(&tar.Header{Name: p, Mode: 0o644, Size: int64(len(body))}); err != nil {
			return err
		}
		_, err = w.Write(body)
		return err
	})
	if err == nil || err == full {
		err = w.Close()
	}
	if err != nil {
		b.Fatal(err)
	}
	return path
}

// BenchmarkTarToLayout compares converting a tar with compressing it by the zstd tool and hashing it by sha256sum, one after
// the other, on the same processors.
func BenchmarkTarToLayout(b *testing.B) {
	src := benchTar(b)
	fi, err := os.Stat(src)
	if err != nil {
		b.Fatal(err)
	}
	b.Run("holdfast", func(b *testing.B) {
		b.SetBytes(fi.Size())
		for b.Loop() {
			out := b.TempDir()
			res, err := Run(context.Background(), Options{Source: "tar:" + src, Dest: "oci:" + out + "/out:x", Codec: rafs.CodecZstd})
			if err != nil {
				b.Fatal(err)
			}
			b.ReportMetric(float64(res.Totals.Stored)/float64(fi.Size()), "stored/byte")
			os.RemoveAll(out)
		}
	})
	b.Run("zstd+sha256sum", func(b *testing.B) {
		b.SetBytes(fi.Size())
		for b.Loop() {
			out := filepath.Join(b.TempDir(), "x.zst")
			for _, args := range [][]string{{"zstd", "-q", "-3", "-T0", "-o", out, src}, {"sha256sum", src}} {
				if msg, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
					b.Fatalf("%v: %s", err, msg)
				}
			}
			fz, err := os.Stat(out)
			if err != nil {
				b.Fatal(err)
			}
			b.ReportMetric(float64(fz.Size())/float64(fi.Size()), "stored/byte")
			os.Remove(out)
		}
	})
}
