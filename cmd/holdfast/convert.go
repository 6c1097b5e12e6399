package main

import (
	"bufio"
	"fmt"
	"os"
	"runtime"
	"strings"

	"github.com/urfave/cli/v2"

	"holdfast/rafs"
	"holdfast/rafs/convert"
	"holdfast/rafs/dictionary"
	"holdfast/rafs/image"
)

func convertCommand() *cli.Command {
	return &cli.Command{
		Name: "convert", Usage: "make a RAFS image of a directory, a tar or an OCI image",
		ArgsUsage: "SOURCE DEST",
		Description: "SOURCE is dir:PATH, tar:PATH (also gzip or zstd), oci:PATH[:TAG] or docker://REF; DEST is oci:PATH:TAG or docker://REF.\n\n" +
			"Example:\n   holdfast convert --prefetch /usr/bin/python3 docker://docker.io/library/python:3 oci:/srv/images:python\n" +
			"   holdfast convert --chunk-dict oci:/srv/images:python docker://registry.example/app oci:/srv/images:app",
		Flags: []cli.Flag{
			&cli.GenericFlag{Name: "chunk-size", Value: &size{rafs.DefaultChunkSize}, Usage: "`BYTES` of a chunk, a power of two from 4KiB to 16MiB"},
			&cli.StringFlag{Name: "compression", Value: rafs.CodecZstd.String(), Usage: "of chunks: `zstd|lz4|none`"},
			&cli.StringFlag{Name: "digest", Value: rafs.Blake3.String(), Usage: "of chunks: `blake3|sha256`"},
			&cli.StringSliceFlag{Name: "chunk-dict", Usage: "refer to the chunks of this RAFS `IMAGE` instead of storing them again: oci:PATH[:TAG], docker://REF or rafs:BOOTSTRAP[,BLOBDIR], made with the same --chunk-size and --digest (repeatable, or separated by commas)"},
			&cli.StringSliceFlag{Name: "platform", Usage: "of an index convert only this `OS/ARCH` (repeatable)"},
			&cli.StringSliceFlag{Name: "prefetch", Usage: "fetch this absolute `PATH` first after mounting, or the paths in a file given as @FILE (repeatable)"},
			&cli.IntFlag{Name: "workers", Value: runtime.NumCPU(), Usage: "`NUMBER` of goroutines that compress; changes no byte of the result"},
		},
		Action: convertImage,
	}
}

func convertImage(c *cli.Context) error {
	args, err := arguments(c, "SOURCE", "DEST")
	if err != nil {
		return err
	}
	o := convert.Options{Source: args[0], Dest: args[1], Platforms: c.StringSlice("platform"), Workers: c.Int("workers")}
	n := bytesOf(c, "chunk-size")
	if n < rafs.MinChunkSize || n > rafs.MaxChunkSize || n&(n-1) != 0 {
		return usagef("--chunk-size=%d: want a power of two from 4KiB to 16MiB", n)
	}
	o.ChunkSize = uint32(n)
	if o.Codec, err = rafs.ParseCodec(c.String("compression")); err != nil {
		return usagef("--compression: %w", err)
	}
	if o.Digest, err = rafs.ParseDigestAlgo(c.String("digest")); err != nil {
		return usagef("--digest: %w", err)
	}
	if o.Prefetch, err = prefetchPaths(c.StringSlice("prefetch")); err != nil {
		return err
	}
	refs, err := dictionaryReferences(c.StringSlice("chunk-dict"))
	if err != nil {
		return err
	}
	dict, err := dictionary.Open(c.Context, refs, image.Options{})
	if err != nil {
		return err
	}
	defer dict.Close() // reading only: nothing to lose
	o.Dictionary = dict.Blobs()
	meter := newMeter(os.Stderr)
	o.Progress = meter.converting
	result, err := convert.Run(c.Context, o)
	meter.finish()
	if err != nil {
		return err
	}
	return printConverted(c, result)
}

func printConverted(c *cli.Context, r *convert.Result) error {
	t := r.Totals
	if _, err := fmt.Fprintf(c.App.Writer, "%s %s\n%s of files in %d chunks, %s stored, %d deduplicated\n", r.Ref, r.Digest,
		human(int64(t.Content)), t.Chunks, human(int64(t.Stored)), t.Deduplicated); err != nil {
		return err
	}
	for _, i := range r.Images {
		if u := i.Dictionary; u.Chunks > 0 {
			if _, err := fmt.Fprintf(c.App.Writer, "%s: %s in %d chunks of %d blobs of the chunk dictionary referred to, %s not stored again\n",
				i.Platform, human(int64(u.Bytes)), u.Chunks, u.Blobs, human(int64(u.Stored))); err != nil {
				return err
			}
		}
		if i.SkippedXattrs > 0 {
			if _, err := fmt.Fprintf(c.App.ErrWriter, "%s: %d extended attributes left out: EROFS has no room for their name spaces\n", i.Platform, i.SkippedXattrs); err != nil {
				return err
			}
		}
	}
	return nil
}

// dictionaryReferences undoes what the command line's commas do to rafs:BOOTSTRAP,BLOBDIR: a part without a scheme is the BLOBDIR of
// the one before it.
func dictionaryReferences(parts []string) (refs []string, err error) {
	for _, p := range parts {
		if n := len(refs); n > 0 && strings.HasPrefix(refs[n-1], "rafs:") && !strings.Contains(refs[n-1], ",") && !hasScheme(p) {
			refs[n-1] += "," + p
			continue
		}
		refs = append(refs, p)
	}
	for _, r := range refs {
		if _, err := image.ParseReference(r); err != nil {
			return nil, usagef("--chunk-dict: %w", err)
		}
	}
	return refs, nil
}

func hasScheme(s string) bool {
	return strings.HasPrefix(s, "oci:") || strings.HasPrefix(s, "docker:") || strings.HasPrefix(s, "rafs:")
}

// prefetchPaths replaces each @FILE by the file's lines.
func prefetchPaths(given []string) (paths []string, err error) {
	for _, p := range given {
		name, isFile := strings.CutPrefix(p, "@")
		if !isFile {
			paths = append(paths, p)
			continue
		}
		f, err := os.Open(name)
		if err != nil {
			return nil, fmt.Errorf("read --prefetch: %w", err)
		}
		defer f.Close()
		in := bufio.NewScanner(f)
		for in.Scan() {
			if in.Text() != "" {
				paths = append(paths, in.Text())
			}
		}
		if err := in.Err(); err != nil {
			return nil, fmt.Errorf("read --prefetch %s: %w", name, err)
		}
	}
	return paths, nil
}
