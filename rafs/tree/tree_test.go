package tree

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"pgregory.net/rapid"
)

func TestNamesThatEntriesCannotHave(t *testing.T) {
	for _, name := range []string{"", ".", "..", "a/b", "/", "a\x00", strings.Repeat("x", 256)} {
		if err := NewRoot().Put(&Node{Name: name, Inode: &Inode{}}); !errors.Is(err, ErrName) {
			t.Errorf("%.10q: got %v, want %v", name, err, ErrName)
		}
	}
	for _, name := range []string{"...", " ", "\xff", strings.Repeat("x", 255)} {
		if err := CheckName(name); err != nil {
			t.Errorf("%.10q: %v", name, err)
		}
	}
}

func TestChildrenAreSortedWhateverTheOrderOfChanges(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		root, want := NewRoot(), map[string]*Node{}
		for range rapid.IntRange(0, 50).Draw(t, "changes") {
			name := rapid.StringMatching("[a-c]{1,2}").Draw(t, "name")
			if rapid.IntRange(0, 3).Draw(t, "remove") == 0 {
				root.Remove(name)
				delete(want, name)
			} else {
				n := &Node{Name: name, Inode: &Inode{}}
				if err := root.Put(n); err != nil {
					t.Fatal(err)
				}
				want[name] = n
			}
			got := root.Children()
			if len(got) != len(want) || !slices.IsSortedFunc(got, func(a, b *Node) int { return strings.Compare(a.Name, b.Name) }) {
				t.Fatalf("%d children, want %d in order", len(got), len(want))
			}
			for _, n := range got {
				if want[n.Name] != n || root.Child(n.Name) != n {
					t.Fatalf("%q is another entry", n.Name)
				}
			}
		}
	})
}

func TestXattrsStaySortedAndUnique(t *testing.T) {
	var ino Inode
	for i, name := range []string{"user.b", "user.a", "user.c", "user.b"} {
		ino.SetXattr(name, []byte{byte(i)})
	}
	if got := fmt.Sprint(ino.Xattrs); got != "[{user.a [1]} {user.b [3]} {user.c [2]}]" {
		t.Fatalf("got %s", got)
	}
	if v, ok := ino.Xattr("user.b"); !ok || v[0] != 3 {
		t.Fatalf("user.b is %v", v)
	}
	if _, ok := ino.Xattr("user.bb"); ok {
		t.Fatal("user.bb is there")
	}
}

func TestLookupFindsWhatWalkNames(t *testing.T) {
	root := NewRoot()
	dir := &Node{Name: "dir", Inode: &Inode{Mode: ModeDir}}
	for _, step := range []error{root.Put(dir), dir.Put(&Node{Name: "file", Inode: &Inode{Mode: ModeFile}}), root.Put(&Node{Name: "a", Inode: &Inode{}})} {
		if step != nil {
			t.Fatal(step)
		}
	}
	var paths []string
	_ = root.Walk(func(path string, n *Node) error {
		paths = append(paths, path)
		if got, err := root.Lookup(path); got != n || err != nil {
			t.Errorf("%q: another entry, %v", path, err)
		}
		return nil
	})
	if !slices.Equal(paths, []string{"/", "/a", "/dir", "/dir/file"}) {
		t.Fatalf("walked %q", paths)
	}
	for _, path := range []string{"", "a", "/b", "/a/b", "//a", "/dir/file/x"} {
		if n, err := root.Lookup(path); n != nil || err == nil {
			t.Errorf("%q: found", path)
		}
	}
}
