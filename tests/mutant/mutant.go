// Package mutant makes builds of holdfast that lack a safety, without touching the source: `go build -overlay` reads changed copies of
// files in the place of the files. It says loudly when what a mutation is to change is not in the source any more, or is there more often
// than it thought. It never runs what it makes.
package mutant

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// A Mutation is a safety removed.
type Mutation struct {
	Name  string
	Edits []Edit
}

// An Edit replaces a piece of a file that must be there exactly once.
type Edit struct {
	File     string // below the root
	Old, New string
}

// Overlay writes the changed files, and what `go build -overlay` must be given, to dir. It returns the latter's path.
func (m Mutation) Overlay(root, dir string) (string, error) {
	root, err := filepath.Abs(root)
	if err != nil {
		return "", err
	}
	texts := map[string]string{}
	for _, e := range m.Edits {
		path := filepath.Join(root, e.File)
		text, ok := texts[path]
		if !ok {
			b, err := os.ReadFile(path)
			if err != nil {
				return "", fmt.Errorf("mutation %q: %w", m.Name, err)
			}
			text = string(b)
		}
		if n := strings.Count(text, e.Old); n != 1 {
			return "", fmt.Errorf("mutation %q: %s has this %d times instead of once; tell the mutation what the safety looks like now:\n%s", m.Name, e.File, n, e.Old)
		}
		texts[path] = strings.Replace(text, e.Old, e.New, 1)
	}
	replace := map[string]string{}
	for path, text := range texts {
		copied := filepath.Join(dir, strings.ReplaceAll(strings.TrimPrefix(path, root), "/", "_"))
		if err := os.WriteFile(copied, []byte(text), 0o600); err != nil {
			return "", err
		}
		replace[path] = copied
	}
	b, err := json.Marshal(map[string]any{"Replace": replace})
	if err != nil {
		return "", err
	}
	overlay := filepath.Join(dir, "overlay.json")
	return overlay, os.WriteFile(overlay, b, 0o600)
}
