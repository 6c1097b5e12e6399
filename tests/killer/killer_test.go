package killer

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

// The test binary is also the tracer, the filter, a keeper that starts a daemon twice, and the daemon.
func TestMain(m *testing.M) {
	Role()
	if len(os.Args) > 1 {
		switch os.Args[1] {
		case "keep":
			keep(os.Args[2], os.Args[4:])
		case "serve":
			serve(os.Args[2])
		}
	}
	os.Exit(m.Run())
}

const lives, writes = 2, 5

// keep starts the daemon twice, to write to different files.
func keep(path string, command []string) {
	for i := range lives {
		cmd := exec.Command(command[0], append(command[1:], path+strconv.Itoa(i))...)
		cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
		_ = cmd.Run() // it is killed
	}
	os.Exit(7)
}

// serve writes bytes to a file, each in a thread of its own.
func serve(path string) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		fmt.Println(err)
		os.Exit(2)
	}
	for i := range writes {
		done := make(chan struct{})
		go func() {
			defer close(done)
			runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
			if _, err := f.WriteAt([]byte("x"), int64(i)); err != nil {
				fmt.Println(err)
			}
		}()
		<-done
	}
	os.Exit(0)
}

// A result is a life, and how many bytes it wrote.
type result struct {
	Life
	wrote int64
}

// trace runs the daemon under the tracer.
func trace(t *testing.T, kill Kill) (results []result) {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	written, report := filepath.Join(dir, "written"), filepath.Join(dir, "report")
	args := slices.Concat(Trace(self, self, report, kill, kill), []string{self, "keep", written, "--"}, Filter(self), []string{self, "serve"})
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	out, err := exec.CommandContext(ctx, args[0], args[1:]...).CombinedOutput()
	if err == nil || err.Error() != "exit status 7" || len(out) > 0 {
		t.Fatalf("the tracer ends with %v, want the keeper's exit status 7 and no output: %s", err, out)
	}
	list, err := ReadReport(report)
	if err != nil {
		t.Fatal(err)
	}
	for i, l := range list {
		r := result{Life: l}
		if fi, err := os.Stat(written + strconv.Itoa(i)); err == nil {
			r.wrote = fi.Size()
		}
		results = append(results, r)
	}
	if len(results) != lives {
		t.Fatalf("%d lives in the report, want %d: %+v", len(results), lives, results)
	}
	return results
}

func TestCallsOfAllThreadsAreCountedAndNobodyIsKilledWithoutOrder(t *testing.T) {
	for _, r := range trace(t, Kill{}) {
		if r.Calls < writes || r.Killed != "" || r.wrote != writes {
			t.Errorf("%+v, want at least %d calls and %d bytes written, and no kill", r, writes, writes)
		}
	}
}

// Every call of the daemon's is tried: what is written where it is a write says whether the kernel did it.
func TestKilledAtEntryTheCallDidNothingAndAtExitAll(t *testing.T) {
	t.Setenv("GOMAXPROCS", "1") // or the order of the calls changes from run to run
	calls := trace(t, Kill{})[0].Calls
	seen := map[string]bool{}
	for k := 1; k <= calls; k++ {
		for _, kill := range []Kill{{k, false}, {k, true}} {
			for _, r := range trace(t, kill) {
				rest, ok := strings.CutPrefix(r.Killed, kill.String()+" ")
				if !ok && k < calls-2 { // with the last calls the end is near anyway
					t.Errorf("kill at %v: %+v", kill, r)
				}
				var fd, buf, n, off, result int64
				if _, err := fmt.Sscanf(rest, "pwrite64(%v, %v, %v, %v)", &fd, &buf, &n, &off); err != nil {
					continue
				}
				want := off
				if kill.Exit {
					want++
				}
				if r.wrote != want {
					t.Errorf("%+v: %d bytes are written, want %d", r, r.wrote, want)
				}
				if _, end, _ := strings.Cut(rest, " = "); kill.Exit {
					if _, err := fmt.Sscan(end, &result); err != nil || result != 1 {
						t.Errorf("%+v: the result is not 1", r)
					}
				}
				seen[fmt.Sprintf("exit %v of write %d", kill.Exit, off)] = true
			}
		}
	}
	if len(seen) != 2*writes {
		t.Errorf("of the entries and exits of %d writes only these were seen: %v", writes, seen)
	}
}
