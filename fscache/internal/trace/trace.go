package trace

import (
	"embed"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"holdfast/fscache"
)

// A Step is a line "verb argument... = result" of a trace. A line that begins with # is a comment; a script is a trace without results. Names
// stand for what numbers would stand for: a request or an event by the name it was read under, a descriptor by the name of the
// OPEN it came with. The verbs, and what they take:
//
//	mount M BOOT BLOB...   begin to mount an image; made M: wait for its end; unmount M
//	reader P M BLOB A+N    begin to read N bytes at A; asleep P; end P: wait for its end
//	victim P M BLOB A+N    the same in a process of its own, for kill P
//	write F A+N            write data through a descriptor
//
//	request R              cachefiles: read one request; closes R...: read as many CLOSEs, in any order
//	copen R SIZE           answer an OPEN, or with an error's name; complete R F: READ_COMPLETE through a descriptor
//	attached F             wait until the kernel has a file for an object
//	dup F G, close F       descriptors
//	restore F...           the command; F are a reader's
//
//	mark BLOB              fanotify: open the file, and mark it
//	event E, starved E     read one event; with no descriptor left
//	answer E allow|deny    by the event's number, whether or not its descriptor is open
//	close E, occupy E      the event's descriptor; something else at its number
//
//	last                   the last descriptor of the device or group closes
type Step struct {
	Verb   string
	Args   []string
	Result string
}

// String returns the step as it stands in a trace.
func (s Step) String() string {
	text := strings.Join(append([]string{s.Verb}, s.Args...), " ")
	if s.Result != "" {
		text += " = " + s.Result
	}
	return text
}

// A Machine does steps on a kernel.
type Machine interface{ Do(s Step) (result string) }

// Parse reads a trace or a script.
func Parse(text string) (steps []Step) {
	for line := range strings.Lines(text) {
		if strings.HasPrefix(line, "#") {
			continue
		}
		words, result, _ := strings.Cut(strings.TrimSpace(line), " = ")
		if f := strings.Fields(words); len(f) > 0 {
			steps = append(steps, Step{f[0], f[1:], strings.TrimSpace(result)})
		}
	}
	return steps
}

//go:embed scripts/*.trace
var files embed.FS

// Script returns the steps of the script of that name.
func Script(t testing.TB, name string) []Step {
	t.Helper()
	b, err := files.ReadFile("scripts/" + name + ".trace")
	if err != nil {
		t.Fatal(err)
	}
	return Parse(string(b))
}

// Compare does a script on a real kernel and on the model, and fails where they differ. With HOLDFAST_TRACES it writes what the real one
// did into that directory: fscache/simkernel/testdata has such records.
func Compare(t *testing.T, script string, real, model Machine) {
	t.Helper()
	var text strings.Builder
	for _, s := range Script(t, script) {
		s.Result = real.Do(s)
		fmt.Fprintln(&text, s)
		if want := model.Do(s); s.Result != want && !t.Failed() {
			t.Errorf("%s, and the model says %s", s, want)
		}
	}
	t.Log("\n" + text.String())
	dir := os.Getenv("HOLDFAST_TRACES")
	if dir == "" {
		return
	}
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		t.Fatal(err)
	}
	name := filepath.Join(dir, script+"@linux-"+unix.ByteSliceToString(u.Release[:])+".trace")
	if err := os.WriteFile(name, []byte(text.String()), 0o644); err != nil {
		t.Fatal(err)
	}
}

// Replay does recorded steps on the model.
func Replay(t *testing.T, steps []Step, model Machine) {
	t.Helper()
	for i, s := range steps {
		if got := model.Do(s); got != s.Result {
			t.Fatalf("step %d: %s, and the model says %s", i+1, s, got)
		}
	}
}

// Domain is where a trace's objects are, BlobSize what its blobs have.
const (
	Domain   = "trace"
	BlobSize = 64 * fscache.BlockSize
)

// Key is the object a trace calls so.
func Key(name string) fscache.Key { return fscache.Key{Domain: Domain, ID: name} }

// Blob is a blob a trace calls so.
func Blob(name string) fscache.Object { return fscache.Object{Key: Key(name), Size: BlobSize} }

// Range reads A+N.
func Range(s string) (off, n int64) {
	if _, err := fmt.Sscanf(s, "%d+%d", &off, &n); err != nil {
		panic(fmt.Sprintf("trace: %q is no range: %v", s, err))
	}
	return off, n
}

// ErrnoName is how an errno stands in a trace.
func ErrnoName(err error) string {
	var errno unix.Errno
	switch {
	case err == nil:
		return "ok"
	case errors.As(err, &errno):
		return unix.ErrnoName(errno)
	}
	return err.Error()
}

// Outcome is how a read stands in a trace, of an object whose data has no zeros. Readers of a dead cachefiles cache get EIO until the kernel
// has withdrawn its objects, on 6.12 ENOBUFS after that: by timing, so both are EIO here.
func Outcome(p []byte, err error) string {
	switch zeros := strings.Count(string(p), "\x00"); {
	case errors.Is(err, unix.ENOBUFS):
		return ErrnoName(unix.EIO)
	case err != nil:
		return ErrnoName(err)
	case zeros == 0:
		return "data"
	case zeros == len(p):
		return "zeros"
	}
	return "zeros and data"
}
