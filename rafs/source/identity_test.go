package source

import (
	"context"
	"errors"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
)

// A fixedKeychain has one answer.
type fixedKeychain struct {
	config authn.AuthConfig
	err    error
}

func (k fixedKeychain) Resolve(authn.Resource) (authn.Authenticator, error) {
	if k.config == (authn.AuthConfig{}) {
		return authn.Anonymous, k.err
	}
	return authn.FromConfig(k.config), k.err
}

func TestIdentityIsOneForEachRegistryAndSetOfCredentials(t *testing.T) {
	key := []byte("key")
	seen := map[string]string{}
	ask := func(what, repo string, key []byte, c authn.AuthConfig) string {
		t.Helper()
		r, err := name.NewRepository(repo)
		if err != nil {
			t.Fatal(err)
		}
		id, err := Identity(context.Background(), r, Options{Keychain: fixedKeychain{config: c}}, key)
		if err != nil || len(id) != 64 || strings.Contains(id, "secret") {
			t.Fatalf("%s: %q, %v", what, id, err)
		}
		return id
	}
	for what, c := range map[string]authn.AuthConfig{
		"nobody": {}, "a user": {Username: "u", Password: "secret"}, "another password": {Username: "u", Password: "secret2"},
		"another split": {Username: "us", Password: "ecret"}, "a token": {RegistryToken: "secret"}, "an identity token": {IdentityToken: "secret"},
	} {
		for _, host := range []string{"one.example", "two.example"} {
			id := ask(what, host+"/x", key, c)
			if other, ok := seen[id]; ok {
				t.Errorf("%s of %s and %s are one", what, host, other)
			}
			seen[id] = what + " of " + host
			if again := ask(what, host+"/another/repository", key, c); again != id {
				t.Errorf("%s of %s is two for two repositories", what, host)
			}
			if ask(what, host+"/x", []byte("other"), c) == id {
				t.Errorf("%s of %s does not depend on the key", what, host)
			}
		}
	}
}

func TestIdentityIsNotGuessedWhereTheKeychainFails(t *testing.T) {
	r, err := name.NewRepository("one.example/x")
	if err != nil {
		t.Fatal(err)
	}
	cause := errors.New("helper failed")
	if id, err := Identity(context.Background(), r, Options{Keychain: fixedKeychain{err: cause}}, nil); !errors.Is(err, cause) {
		t.Errorf("identity %q, %v", id, err)
	}
}
