package bootstrap

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math"
	"sort"
	"strings"

	"holdfast/rafs/tree"
)

// An xattrPrefix is a start of names that is stored as a number (EROFS_XATTR_INDEX_*).
type xattrPrefix struct {
	index  uint8
	prefix string
	whole  bool // the prefix is the whole name
}

var xattrPrefixes = []xattrPrefix{
	{1, "user.", false},
	{2, "system.posix_acl_access", true},
	{3, "system.posix_acl_default", true},
	{4, "trusted.", false},
	{6, "security.", false},
}

// maxXattrs is the largest size of an inode's xattrs with their header: i_xattr_icount has 16 bits and counts the header
// as 1 and then units of 4 bytes.
const maxXattrs = xattrHeaderSize + 4*(math.MaxUint16-1)

// splitXattr returns the index and the rest of an attribute's name.
func splitXattr(name string) (index uint8, suffix string, err error) {
	for _, p := range xattrPrefixes {
		rest, ok := strings.CutPrefix(name, p.prefix)
		if !ok || p.whole != (rest == "") {
			continue
		}
		if len(rest) > math.MaxUint8 || strings.IndexByte(rest, 0) >= 0 {
			return 0, "", fmt.Errorf("xattr name %.64q is over 255 bytes long or has a NUL in it", name)
		}
		return p.index, rest, nil
	}
	return 0, "", fmt.Errorf("xattr %.64q is in no name space that EROFS knows (user, trusted, security, POSIX ACLs)", name)
}

// xattrSize returns the bytes that the attributes take after an inode, 0 without any, and checks them.
func xattrSize(xattrs []tree.Xattr) (int, error) {
	if len(xattrs) == 0 {
		return 0, nil
	}
	size := xattrHeaderSize
	for i, x := range xattrs {
		_, suffix, err := splitXattr(x.Name)
		if err != nil {
			return 0, err
		}
		if i > 0 && xattrs[i-1].Name >= x.Name {
			return 0, fmt.Errorf("xattr %.64q is there twice or out of order", x.Name)
		}
		if len(x.Value) > math.MaxUint16 {
			return 0, fmt.Errorf("xattr %.64q has %d bytes, at most %d are possible", x.Name, len(x.Value), math.MaxUint16)
		}
		size += (xattrEntrySize + len(suffix) + len(x.Value) + 3) &^ 3
		if size > maxXattrs {
			return 0, fmt.Errorf("xattrs take over %d bytes", maxXattrs)
		}
	}
	return size, nil
}

// xattrCount is i_xattr_icount for attributes of size bytes.
func xattrCount(size int) uint16 {
	if size == 0 {
		return 0
	}
	return uint16((size-xattrHeaderSize)/4 + 1)
}

// putXattrs writes attributes that xattrSize accepted to b, which is zeroed: no shared attributes, no name filter.
func putXattrs(b []byte, xattrs []tree.Xattr) {
	if len(xattrs) == 0 {
		return
	}
	b = b[xattrHeaderSize:]
	for _, x := range xattrs {
		index, suffix, _ := splitXattr(x.Name) // xattrSize checked it
		b[0] = uint8(len(suffix))
		b[1] = index
		binary.LittleEndian.PutUint16(b[2:], uint16(len(x.Value)))
		copy(b[xattrEntrySize:], suffix)
		copy(b[xattrEntrySize+len(suffix):], x.Value)
		b = b[(xattrEntrySize+len(suffix)+len(x.Value)+3)&^3:]
	}
}

// parseXattrs is the inverse of putXattrs for all that xattrCount says is there. Values are copied out of b.
func parseXattrs(b []byte) ([]tree.Xattr, error) {
	if n := b[4]; n != 0 {
		return nil, fmt.Errorf("%w: %d shared xattrs", ErrUnsupported, n)
	}
	var out []tree.Xattr
	for off := xattrHeaderSize; off < len(b); {
		e := b[off:] // at least 4 bytes: everything is a multiple of 4
		nameLen, index := int(e[0]), e[1]
		end := xattrEntrySize + nameLen + int(binary.LittleEndian.Uint16(e[2:]))
		if end > len(e) {
			return nil, fmt.Errorf("%w: xattr at +%d takes %d bytes where %d are left", ErrDamaged, off, end, len(e))
		}
		name, err := joinXattr(index, e[xattrEntrySize:xattrEntrySize+nameLen])
		if err != nil {
			return nil, fmt.Errorf("xattr at +%d: %w", off, err)
		}
		out = append(out, tree.Xattr{Name: name, Value: bytes.Clone(e[xattrEntrySize+nameLen : end])})
		off += (end + 3) &^ 3
	}
	sort.Slice(out, func(i, j int) bool { return out[i].Name < out[j].Name })
	for i := 1; i < len(out); i++ {
		if out[i].Name == out[i-1].Name {
			return nil, fmt.Errorf("%w: xattr %.64q is there twice", ErrDamaged, out[i].Name)
		}
	}
	return out, nil
}

// joinXattr is the inverse of splitXattr.
func joinXattr(index uint8, suffix []byte) (string, error) {
	if index&0x80 != 0 {
		return "", fmt.Errorf("%w: long xattr name prefixes", ErrUnsupported)
	}
	for _, p := range xattrPrefixes {
		if p.index != index {
			continue
		}
		if p.whole != (len(suffix) == 0) || bytes.IndexByte(suffix, 0) >= 0 {
			break
		}
		return p.prefix + string(suffix), nil
	}
	return "", fmt.Errorf("%w: name space %d with name %.64q", ErrDamaged, index, suffix)
}
