package source

import (
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
)

// Identity names who a registry takes the user of a repository for: the same for the same registry and the same credentials, another for any
// others, and no credentials are an identity too. It is 64 hex digits, a MAC under key over the registry and all that the keychain has for
// it, so that nobody who sees it can try passwords on it. Nothing is sent to the registry.
func Identity(ctx context.Context, repo name.Repository, o Options, key []byte) (string, error) {
	if o.Keychain == nil {
		o.Keychain = authn.DefaultKeychain
	}
	auth, err := authn.Resolve(ctx, o.Keychain, repo)
	if err != nil {
		return "", fmt.Errorf("credentials for %s: %w", repo.Registry, err)
	}
	c, err := authn.Authorization(ctx, auth)
	if err != nil {
		return "", fmt.Errorf("credentials for %s: %w", repo.Registry, err)
	}
	// An array of strings: no two credentials are written the same way.
	b, err := json.Marshal([]string{repo.RegistryStr(), c.Username, c.Password, c.Auth, c.IdentityToken, c.RegistryToken})
	if err != nil {
		return "", fmt.Errorf("credentials for %s: %w", repo.Registry, err)
	}
	m := hmac.New(sha256.New, key)
	m.Write(b)
	return hex.EncodeToString(m.Sum(nil)), nil
}
