package image

import (
	"bufio"
	"fmt"
	"io"
	"strconv"
	"strings"
)

// Print writes the description for people: the image, its blobs, what deduplication saves, and the tree like ls -l does.
// Names and targets that hold anything but printable characters are quoted.
func (d *Description) Print(w io.Writer) error {
	b := bufio.NewWriter(w)
	fmt.Fprintf(b, "image      %s\ndigest     %s\nbootstrap  %d bytes\nchunks     %d bytes, %s, %s\n", d.Ref, d.Digest, d.BootstrapSize, d.ChunkSize, d.Codec, d.DigestAlgo)
	s := d.Dedup
	fmt.Fprintf(b, "files      %d bytes in %d references to %d chunks (%d bytes, stored in %d; %d bytes are shared)\n", s.FileBytes, s.References, s.Chunks, s.ChunkBytes, s.StoredBytes, s.SharedBytes)
	for i, x := range d.Blobs {
		fmt.Fprintf(b, "blob %-5d %s: file %d bytes, object %d bytes, %d chunks, %d used, %d shared\n", i, x.ID, x.FileSize, x.ObjectSize, x.Chunks, x.Used, x.Shared)
	}
	for _, p := range d.Prefetch {
		fmt.Fprintf(b, "prefetch   %s\n", printable(p))
	}
	b.WriteByte('\n')
	for _, e := range d.Tree {
		e.print(b)
	}
	return b.Flush()
}

func (e *Entry) print(b *bufio.Writer) {
	size := strconv.FormatUint(e.Size, 10)
	if e.Type == "char" || e.Type == "block" {
		size = fmt.Sprintf("%d,%d", e.Major, e.Minor)
	}
	mark := byte(' ')
	if len(e.Xattrs) > 0 {
		mark = '+'
	}
	fmt.Fprintf(b, "%s%c %3d %5d %5d %12s %s %s", modeString(e.Type, e.Mode), mark, e.Nlink, e.UID, e.GID, size, e.Mtime.Format("2006-01-02 15:04:05"), printable(e.Path))
	if e.Type == "link" {
		b.WriteString(" -> " + printable(e.Target))
	}
	b.WriteByte('\n')
	for _, c := range e.Chunks {
		fmt.Fprintf(b, "    blob %d chunk %d: %d bytes at %d, stored in %d at %d, %s\n", c.Blob, c.Index, c.Size, c.Offset, c.Stored, c.BlobOffset, c.Digest)
	}
}

// modeString is what ls -l shows of a mode.
func modeString(kind string, mode uint32) string {
	first := map[string]byte{"dir": 'd', "link": 'l', "char": 'c', "block": 'b', "fifo": 'p', "socket": 's', "file": '-'}[kind]
	out := []byte{first}
	for i := 8; i >= 0; i-- {
		c := byte('-')
		if mode>>i&1 != 0 {
			c = "xwr"[i%3]
		}
		out = append(out, c)
	}
	// Set-user-id, set-group-id and sticky bits change the letters for execution.
	for i, at := range [3]int{3, 6, 9} {
		if mode&(0o4000>>i) == 0 {
			continue
		}
		letter := "sst"[i]
		if out[at] == '-' {
			letter -= 'a' - 'A'
		}
		out[at] = letter
	}
	return string(out)
}

// printable quotes s if a terminal would not show it as it is.
func printable(s string) string {
	if q := strconv.Quote(s); q != `"`+s+`"` || strings.ContainsAny(s, " ") {
		return q
	}
	return s
}
