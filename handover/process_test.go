package handover

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// inFlight are the requests that the predecessor of these tests has when it hands over.
var inFlight = []string{"1", "2", "3"}

// A worker is a daemon of two processes' tests. The engine is a file: who reads it has the lock on it. An answer is a file, which the first to
// answer makes: as in the kernel a second answer finds nothing. What happens is written to standard output, which both processes share.
type worker struct {
	side        string
	dir         string
	engine      *os.File
	todo        []string
	done        chan Record
	predecessor int
}

func newWorker(side, dir string) *worker {
	f, err := os.OpenFile(filepath.Join(dir, "engine"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		panic(err)
	}
	number, _, _ := strings.Cut(os.Getenv(socketVariable), ":")
	predecessor, _ := strconv.Atoi(number) // 0 in the predecessor
	return &worker{side: side, dir: dir, engine: f, done: make(chan Record), predecessor: predecessor}
}

// at writes down an event, and dies there if the test says so.
func (w *worker) at(event string) {
	line := fmt.Sprintf("%s %s %d\n", w.side, event, time.Now().UnixNano())
	if os.Getenv("DIE_AT") == w.side+" "+event {
		_, _ = os.Stdout.WriteString(line + w.side + " dies" + strings.TrimPrefix(line, w.side+" "+event))
		_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
		select {}
	}
	_, _ = os.Stdout.WriteString(line)
	if os.Getenv("STOP_AT") == w.side+" "+event {
		_ = syscall.Kill(os.Getpid(), syscall.SIGSTOP)
	}
}

func (w *worker) read() {
	if err := unix.Flock(int(w.engine.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		w.at("VIOLATION-another-process-reads")
	}
	w.at("reads")
}

func (w *worker) stopReading() {
	if err := unix.Flock(int(w.engine.Fd()), unix.LOCK_UN); err != nil {
		panic(err)
	}
	w.at("stopped")
}

func (w *worker) answer(id string) {
	f, err := os.OpenFile(filepath.Join(w.dir, "answered-"+id), os.O_CREATE|os.O_EXCL, 0o600)
	switch {
	case err == nil:
		w.at("answered-" + id)
		_ = f.Close()
	case !errors.Is(err, os.ErrExist):
		panic(err)
	}
}

// As a Giver.

func (w *worker) Done() <-chan Record {
	go func() { // ends with the process
		for _, id := range w.todo {
			w.answer(id)
			w.done <- Record{Kind: "done", Body: []byte(id)}
		}
		close(w.done)
	}()
	return w.done
}

func (w *worker) Resume() { w.read() }

type giverRole struct{ *worker }

func (w giverRole) Prepare() ([]Record, error) {
	w.at("prepares")
	return []Record{{Kind: "objects", Files: []NamedFile{{"engine", w.engine}}}}, nil
}

func (w giverRole) Update() ([]Record, error) { return nil, nil }

func (w giverRole) Commit() ([]Record, error) {
	w.stopReading()
	return []Record{{Kind: "pending", Body: []byte(strings.Join(w.todo, ","))}}, nil
}

func predecessorRole(dir string) int {
	w := newWorker("old", dir)
	w.todo = inFlight
	w.read()
	conn, err := Start(context.Background(), StartOptions{Path: os.Args[0], Args: []string{"role=successor", dir}, Dir: dir}, long)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		w.serve()
		return 0
	}
	if parent, err := parentOf(conn.PID()); err == nil && parent != os.Getppid() { // the supervisor is the parent of both
		w.at("VIOLATION-wrong-successor")
	}
	given, err := Give(context.Background(), conn, oldHello, giverRole{w}, long)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
	}
	if given.Taken {
		w.at("leaves")
		return 0
	}
	w.serve()
	return 0
}

// serve answers everything, as a daemon that goes on.
func (w *worker) serve() {
	w.at("serves")
	for _, id := range w.todo {
		w.answer(id)
	}
}

// As a Taker.

type takerRole struct{ *worker }

func (w takerRole) Prepare(records []Record) error {
	w.at("prepares")
	_ = w.engine.Close()
	w.engine = records[0].Files[0].File
	// The lock belongs to the open file description, which both now have: one of its own says who reads.
	f, err := os.OpenFile(filepath.Join(w.dir, "engine"), os.O_RDWR, 0)
	if err != nil {
		return err
	}
	_ = w.engine.Close()
	w.engine = f
	return nil
}

func (w takerRole) Update(r Record) error {
	w.todo = strings.Split(string(r.Body), ",")
	return nil
}

func (w takerRole) Commit() error {
	w.at("commits")
	return nil
}

func (w takerRole) Start() { w.read() }

func (w takerRole) Done(r Record) {
	w.todo = slices.DeleteFunc(w.todo, func(id string) bool { return id == string(r.Body) })
	w.at("told-" + string(r.Body))
}

func (w takerRole) Drained(err error) {
	w.at("drained")
	if err != nil && processRuns(w.predecessor) {
		w.at("VIOLATION-the-predecessor-lives")
	}
	w.serve()
}

// processRuns says whether the process is there and no zombie.
func processRuns(pid int) bool {
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return false
	}
	_, rest, _ := strings.Cut(string(b), ") ")
	return !strings.HasPrefix(rest, "Z") && !strings.HasPrefix(rest, "X")
}

func successorRole(dir string) int {
	w := newWorker("new", dir)
	w.at("begins")
	conn, err := Dial()
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	times := long
	times.Drain = time.Second
	if conn.PID() != w.predecessor {
		w.at("VIOLATION-wrong-predecessor")
	}
	taken, err := Take(context.Background(), conn, newHello, takerRole{w}, times)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
	}
	w.at("ends-" + strconv.FormatBool(taken))
	return 0
}

// runUpgrade runs both processes until both have ended, and returns what they wrote, a line without its time, and the times;
// and at the end a line for each request that was answered.
func runUpgrade(t *testing.T, env ...string) (lines []string, times []time.Time) {
	t.Helper()
	dir := t.TempDir()
	cmd := exec.Command(os.Args[0], "role=predecessor", dir)
	cmd.Env = append(os.Environ(), env...)
	var stderr strings.Builder
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	errs, err := cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	timer := time.AfterFunc(patience, func() { _ = cmd.Process.Kill() })
	defer timer.Stop()
	for in := bufio.NewScanner(stdout); in.Scan(); { // until both have closed it
		line, stamp, _ := strings.Cut(in.Text(), " ")
		event, ns, _ := strings.Cut(stamp, " ")
		n, err := strconv.ParseInt(ns, 10, 64)
		if err != nil {
			t.Fatalf("line %q", in.Text())
		}
		lines, times = append(lines, line+" "+event), append(times, time.Unix(0, n))
	}
	for in := bufio.NewScanner(errs); in.Scan(); {
		stderr.WriteString(in.Text() + "\n")
	}
	_ = cmd.Wait()
	t.Logf("%s\n%s", strings.Join(lines, "\n"), stderr.String())
	for _, l := range lines {
		if strings.Contains(l, "VIOLATION") {
			t.Error(l)
		}
	}
	if n := strings.Count(strings.Join(lines, "\n"), "answered-"); n > len(inFlight) {
		t.Errorf("%d answers", n)
	}
	for _, id := range inFlight { // also of one who died before it could write that down
		if _, err := os.Stat(filepath.Join(dir, "answered-"+id)); err == nil {
			lines, times = append(lines, "kernel was-answered-"+id), append(times, time.Now())
		}
	}
	return lines, times
}

func answeredAll(lines []string) bool {
	for _, id := range inFlight {
		if !slices.Contains(lines, "kernel was-answered-"+id) {
			return false
		}
	}
	return true
}

func TestUpgradeOfARealProcess(t *testing.T) {
	lines, _ := runUpgrade(t)
	for _, want := range []string{"old stopped", "new reads", "old answered-3", "new told-3", "new drained", "old leaves", "new ends-true"} {
		if !slices.Contains(lines, want) {
			t.Errorf("missing: %s", want)
		}
	}
}

func TestPredecessorServesOnWhenTheSuccessorDiesBeforeItMayRead(t *testing.T) {
	for _, event := range []string{"begins", "prepares", "commits"} {
		t.Run(event, func(t *testing.T) {
			t.Parallel()
			var gap time.Duration
			for range 3 { // a machine that does other things may be slow once
				lines, times := runUpgrade(t, "DIE_AT=new "+event)
				died, serves := slices.Index(lines, "new dies"), slices.Index(lines, "old serves")
				if died < 0 || serves < 0 || slices.Contains(lines, "new reads") {
					t.Fatal("it does not serve on")
				}
				if stopped := slices.Contains(lines, "old stopped"); stopped != (event == "commits") {
					t.Errorf("stopped: %v", stopped)
				}
				if !answeredAll(lines) {
					t.Error("requests were lost")
				}
				if gap = times[serves].Sub(times[died]); gap < 100*time.Millisecond {
					return
				}
			}
			t.Errorf("served again after %v", gap)
		})
	}
}

func TestPredecessorNeverReadsAgainWhenTheSuccessorDiesAfterGo(t *testing.T) {
	for _, event := range []string{"reads", "told-1", "drained"} {
		t.Run(event, func(t *testing.T) {
			t.Parallel()
			lines, _ := runUpgrade(t, "DIE_AT=new "+event)
			if slices.Contains(lines, "old serves") || !slices.Contains(lines, "old leaves") || !answeredAll(lines) {
				t.Error("not what it should do")
			}
		})
	}
}

func TestSuccessorEndsWithoutEffectWhenThePredecessorDiesBeforeGo(t *testing.T) {
	for _, event := range []string{"prepares", "stopped"} {
		t.Run(event, func(t *testing.T) {
			t.Parallel()
			lines, _ := runUpgrade(t, "DIE_AT=old "+event)
			if slices.Contains(lines, "new reads") || !slices.Contains(lines, "new ends-false") {
				t.Error("not what it should do")
			}
		})
	}
}

func TestSuccessorAnswersWhatADeadPredecessorDidNot(t *testing.T) {
	for _, event := range []string{"answered-1", "answered-2", "answered-3", "leaves"} {
		t.Run(event, func(t *testing.T) {
			t.Parallel()
			lines, _ := runUpgrade(t, "DIE_AT=old "+event)
			if !slices.Contains(lines, "new reads") || !slices.Contains(lines, "new drained") || !answeredAll(lines) {
				t.Error("not what it should do")
			}
		})
	}
}

func TestStoppedPredecessorIsKilledBeforeItIsAnsweredFor(t *testing.T) {
	lines, _ := runUpgrade(t, "STOP_AT=old answered-2")
	if !slices.Contains(lines, "new drained") || !answeredAll(lines) {
		t.Error("not what it should do")
	}
}

func TestStartThatFailsLeavesNothing(t *testing.T) {
	tests := []struct {
		name string
		path string
		args []string
		want string
	}{
		{"the program is not there", "/nonexistent/holdfast", nil, "no such file"},
		{"it ends at once", "/bin/false", nil, "it ended before it dialled"},
		{"it never dials", "/bin/sh", []string{"-c", "echo $$ >pid; exec sleep 600"}, "did not dial within"},
		{"a shell starts it", "/bin/sh", []string{"-c", "echo $$ >pid; " + os.Args[0] + " role=stranger; exec sleep 600"}, "exec it"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			before := openFDs("self")
			dir := t.TempDir()
			for i, arg := range tt.args {
				tt.args[i] = strings.ReplaceAll(arg, ">pid", ">"+dir+"/pid")
			}
			times := Timeouts{Start: patience}
			if strings.Contains(tt.want, "dial") || strings.Contains(tt.want, "exec") {
				times.Start = time.Second
			}
			_, err := Start(t.Context(), StartOptions{Path: tt.path, Args: tt.args, Dir: dir}, times)
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Fatalf("got %v, want an error with %q", err, tt.want)
			}
			if _, err := os.Stat(filepath.Join(dir, "handover.sock")); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("the socket is left: %v", err)
			}
			if after := openFDs("self"); len(after) != len(before) {
				t.Errorf("open before: %q, after: %q", before, after)
			}
			if text, err := os.ReadFile(filepath.Join(dir, "pid")); err == nil {
				pid, err := strconv.Atoi(strings.TrimSpace(string(text)))
				if err != nil || processRuns(pid) {
					t.Errorf("process %d still runs (%v)", pid, err)
				}
			}
			l, err := TakeLock(filepath.Join(dir, "handover.lock"))
			if err != nil {
				t.Fatal(err)
			}
			_ = l.Close()
		})
	}
}

func TestUpgradeThatIsCalledOffWhileItStartsLeavesNothing(t *testing.T) {
	ctx, cancel := context.WithCancelCause(t.Context())
	called := errors.New("called off by a person")
	time.AfterFunc(50*time.Millisecond, func() { cancel(called) })
	if _, err := Start(ctx, StartOptions{Path: "/bin/sleep", Args: []string{"60"}, Dir: t.TempDir()}, long); !errors.Is(err, called) {
		t.Fatalf("got %v", err)
	}
}

func TestSecondUpgradeAtOnceIsRefused(t *testing.T) {
	dir := t.TempDir()
	lock, err := TakeLock(filepath.Join(dir, "handover.lock"))
	if err != nil {
		t.Fatal(err)
	}
	defer lock.Close()
	_, err = Start(t.Context(), StartOptions{Path: "/bin/false", Dir: dir}, long)
	var locked *LockedError
	if !errors.As(err, &locked) || locked.PID != os.Getpid() {
		t.Fatalf("got %v", err)
	}
}

func TestSuccessorIsNotToldWhatTheSupervisorSaidToItsPredecessor(t *testing.T) {
	got := withoutSupervisor([]string{"HOME=/root", "NOTIFY_SOCKET=/x", "LISTEN_PID=1", "LISTEN_FDS=1", "SYSTEMD_EXEC_PID=1", "HOLDFAST_HANDOVER=1:/old", "WATCHDOG_PID=1", "A=b=c"})
	if want := []string{"HOME=/root", "A=b=c"}; !slices.Equal(got, want) {
		t.Fatalf("got %q", got)
	}
}

func TestDialWithoutAPredecessorSaysSo(t *testing.T) {
	if _, err := Dial(); !errors.Is(err, ErrNoPredecessor) {
		t.Fatalf("got %v", err)
	}
	dir := t.TempDir()
	l, err := listen(filepath.Join(dir, "s")) // this process's, which is not its own parent
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	t.Setenv(socketVariable, fmt.Sprintf("%d:%s", os.Getppid(), filepath.Join(dir, "s")))
	if _, err := Dial(); err == nil || !strings.Contains(err.Error(), "at the other end is process") {
		t.Fatalf("got %v", err)
	}
	if v := os.Getenv(socketVariable); v != "" {
		t.Fatalf("the variable is left at %q for children to use", v)
	}
}
