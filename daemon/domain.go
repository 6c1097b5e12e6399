package daemon

import (
	"context"
	"strings"

	"holdfast/rafs/image"
)

// LocalDomain is where images from local files are mounted that name no domain.
const LocalDomain = "local"

// Lengths in a derived domain's name: the registry in clear, for people, and as much of the identity as nobody can meet by trying.
const (
	maxDomain      = 64
	domainIdentity = 24 // hex digits: 96 bits
	domainRegistry = maxDomain - domainIdentity - 1
)

// domainOf is where an image is mounted that names no domain: one for each registry and each set of credentials for it, and one for local
// files. What one user of a registry may see need not be for another (I8). No secret is in the name, which the kernel shows to everybody: it
// is derived with a key of this host's.
func (d *Daemon) domainOf(ctx context.Context, ref string) (string, error) {
	key, err := d.state.Secret()
	if err != nil {
		return "", err
	}
	registry, identity, err := image.Owner(ctx, ref, d.opt.Image, key)
	if err != nil {
		return "", unusable(err)
	}
	if registry == "" {
		return LocalDomain, nil
	}
	return domainName(registry, identity), nil
}

// domainName makes a name that checkDomain accepts. The identity is of the registry and all: two registries whose names look the
// same here have different ones.
func domainName(registry, identity string) string {
	plain := strings.Map(func(r rune) rune {
		switch {
		case 'A' <= r && r <= 'Z':
			return r - 'A' + 'a'
		case 'a' <= r && r <= 'z', '0' <= r && r <= '9', r == '.', r == '_':
			return r
		}
		return '-'
	}, registry)
	plain = strings.TrimLeft(plain, "._-")
	plain = plain[:min(len(plain), domainRegistry)]
	if plain == "" {
		plain = "registry"
	}
	return plain + "-" + identity[:domainIdentity]
}

// checkDomain accepts names that are safe as a directory and as a part of the kernel's volume keys: 1 to 64 of a-z, 0-9,
// '.', '_' and '-', beginning with a letter or digit.
func checkDomain(name string) error {
	const hint = "use 1 to 64 of a-z, 0-9, '.', '_' and '-', beginning with a letter or a digit"
	if len(name) == 0 || len(name) > maxDomain {
		return invalid(hint, "domain name of %d bytes", len(name))
	}
	for i, c := range []byte(name) {
		word := 'a' <= c && c <= 'z' || '0' <= c && c <= '9'
		if !word && (i == 0 || !strings.ContainsRune("._-", rune(c))) {
			return invalid(hint, "domain name %q", name)
		}
	}
	return nil
}
