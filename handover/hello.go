package handover

import (
	"encoding/binary"
	"fmt"
	"slices"
	"strings"
)

// A Hello is what one side of an upgrade says of itself.
type Hello struct {
	Release     string
	Understands []string // the kinds of records it can receive
	Needs       []string // the kinds of records that the other must understand
}

const (
	maxRelease = 255
	maxKind    = 64
	maxKinds   = 256
)

// A spoken is a Hello with the versions of the protocol its side speaks.
type spoken struct {
	Hello
	low, high uint16
}

// body is a hello's body. It fails if h says what cannot be said.
func (s spoken) body() ([]byte, error) {
	if err := s.check(); err != nil {
		return nil, err
	}
	b := binary.LittleEndian.AppendUint16(nil, s.low)
	b = binary.LittleEndian.AppendUint16(b, s.high)
	b = appendText(b, s.Release)
	b = appendList(b, s.Understands)
	return appendList(b, s.Needs), nil
}

// decodeHello parses a hello's body; what a later release appended is ignored.
func decodeHello(body []byte) (spoken, error) {
	r := reader{b: body}
	s := spoken{low: r.u16(), high: r.u16()}
	s.Release = r.text()
	s.Understands = r.list()
	s.Needs = r.list()
	if r.bad {
		return spoken{}, fmt.Errorf("%w: hello ends early", errFrameBody)
	}
	if err := s.check(); err != nil {
		return spoken{}, fmt.Errorf("%w: %w", errFrameBody, err)
	}
	return s, nil
}

func (s spoken) check() error {
	if s.low > s.high {
		return fmt.Errorf("versions %d to %d", s.low, s.high)
	}
	if len(s.Release) > maxRelease || len(s.Understands) > maxKinds || len(s.Needs) > maxKinds {
		return fmt.Errorf("a release's name of %d bytes, %d and %d kinds of records: too many", len(s.Release), len(s.Understands), len(s.Needs))
	}
	for _, k := range slices.Concat(s.Understands, s.Needs) {
		if err := checkKind(k); err != nil {
			return err
		}
	}
	return nil
}

func checkKind(k string) error {
	if k == "" || len(k) > maxKind {
		return fmt.Errorf("a kind of record has 1 to %d bytes, not %d", maxKind, len(k))
	}
	for _, c := range []byte(k) {
		if c <= ' ' || c > '~' {
			return fmt.Errorf("kind of record %q has a character that is not printable ASCII", k)
		}
	}
	return nil
}

// agree returns the version that both sides speak, or says why they cannot work together. Both sides come to the same result.
func agree(local, peer spoken) (uint16, error) {
	v := min(local.high, peer.high)
	if v < max(local.low, peer.low) {
		return 0, fmt.Errorf("release %s speaks versions %d to %d of the upgrade protocol, release %q versions %d to %d: "+
			"upgrade over a release between them, or restart the daemon", local.Release, local.low, local.high, peer.Release, peer.low, peer.high)
	}
	if err := lacks(local.Hello, peer.Hello); err != nil {
		return 0, err
	}
	return v, lacks(peer.Hello, local.Hello)
}

// lacks is an error if b does not understand all that a needs.
func lacks(a, b Hello) error {
	missing := slices.DeleteFunc(slices.Clone(a.Needs), func(k string) bool { return slices.Contains(b.Understands, k) })
	if len(missing) == 0 {
		return nil
	}
	return fmt.Errorf("release %q does not understand records that release %q needs understood (%s): restart the daemon instead of upgrading it",
		b.Release, a.Release, strings.Join(missing, ", "))
}
