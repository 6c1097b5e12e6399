package image

import (
	"context"

	"holdfast/rafs/source"
)

// Owner says which registry an image is from, "host" or "host:port", and who that takes the user for (see source.Identity). Both are ""
// for an image that is local. Nothing is sent to the registry.
func Owner(ctx context.Context, ref string, o Options, key []byte) (registry, identity string, err error) {
	r, err := ParseReference(ref)
	if err != nil || r.image.Name == nil {
		return "", "", err
	}
	repo := r.image.Name.Context()
	identity, err = source.Identity(ctx, repo, source.Options{Keychain: o.Keychain}, key)
	return repo.RegistryStr(), identity, err
}
