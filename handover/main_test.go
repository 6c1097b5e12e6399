package handover

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"
)

// The test binary is also the keeper, its trampoline and the daemon of these tests, by its first argument.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 {
		switch os.Args[1] {
		case "role=exec":
			fmt.Fprintln(os.Stderr, Exec(os.Args[2:]))
			os.Exit(127)
		case "role=keep":
			os.Exit(keepRole(os.Args[2], os.Args[3:]))
		case "role=daemon":
			os.Exit(daemonRole(os.Args[2]))
		case "role=predecessor":
			os.Exit(predecessorRole(os.Args[2]))
		case "role=successor":
			os.Exit(successorRole(os.Args[2]))
		case "role=inherit":
			files, err := Inherited()
			fmt.Println(len(files), err)
			os.Exit(0)
		case "role=hang":
			os.Exit(hangRole(os.Args[2], os.Args[3]))
		case "role=stranger": // dials, as a successor's grandchild would
			_, where, _ := strings.Cut(os.Getenv(socketVariable), ":")
			conn, err := net.Dial("unixpacket", where)
			if err != nil {
				os.Exit(1)
			}
			_, _ = conn.Read(make([]byte, 1))
			os.Exit(0)
		}
	}
	// The race detector's second at the end of every process, of which these tests have hundreds.
	_ = os.Setenv("GORACE", os.Getenv("GORACE")+" atexit_sleep_ms=0")
	before := openFDs("self")
	code := m.Run()
	if after := openFDs("self"); code == 0 && len(after) > len(before) {
		fmt.Fprintf(os.Stderr, "descriptors left open: %q before, %q after\n", before, after)
		code = 1
	}
	os.Exit(code)
}

func keepRole(dir string, command []string) int {
	log := zap.Must(zap.NewDevelopment())
	watchdog, _ := time.ParseDuration(os.Getenv("KEEP_WATCHDOG"))
	code, err := Keep(KeepOptions{Command: command, Trampoline: []string{os.Args[0], "role=exec"}, Dir: dir, Log: log, Watchdog: watchdog})
	if err != nil {
		fmt.Fprintln(os.Stderr, "error:", err)
		return 99
	}
	return code
}

// daemonRole says hello on the control socket and does what it is told there, a line at a time.
func daemonRole(control string) int {
	conn, err := net.Dial("unix", control)
	if err != nil {
		return 98
	}
	files, err := Inherited()
	if err != nil {
		fmt.Fprintln(conn, err)
		return 97
	}
	store, err := OpenStore()
	if err != nil {
		fmt.Fprintln(conn, err)
		return 96
	}
	d := &daemon{control: control, store: store, files: files}
	names := make([]string, 0, len(files))
	for name := range files {
		names = append(names, name)
	}
	slices.Sort(names)
	fmt.Fprintln(conn, os.Getpid(), strings.Join(names, ","))
	for in := bufio.NewScanner(conn); in.Scan(); {
		answer, err := d.do(strings.Fields(in.Text()))
		if err != nil {
			answer = "error: " + err.Error()
		}
		fmt.Fprintln(conn, answer)
	}
	return 0
}

type daemon struct {
	control string
	store   *Store
	files   map[string]*os.File
}

func (d *daemon) do(line []string) (string, error) {
	switch line[0] {
	case "push": // push NAME: a memfd that holds NAME's own name
		f, err := memFile(line[1])
		if err != nil {
			return "", err
		}
		return "ok", d.store.Push(line[1], f)
	case "push-and-die": // no barrier, no time
		f, err := memFile(line[1])
		if err != nil {
			return "", err
		}
		err = d.store.send("FDSTORE=1\nFDNAME="+line[1], unix.UnixRights(int(f.Fd())))
		if err != nil {
			return "", err
		}
		return "", syscall.Kill(os.Getpid(), syscall.SIGKILL)
	case "push-many": // push-many N: as many pipes
		n, err := strconv.Atoi(line[1])
		if err != nil {
			return "", err
		}
		files := make([]NamedFile, n)
		for i := range files {
			r, w, err := os.Pipe()
			if err != nil {
				return "", err
			}
			defer r.Close()
			defer w.Close()
			files[i] = NamedFile{"o" + strconv.FormatInt(int64(i), 36), r}
		}
		return "ok", d.store.PushAll(files)
	case "push-socket": // push-socket NAME
		fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return "", err
		}
		f := os.NewFile(uintptr(fd), line[1])
		defer f.Close()
		return "ok", d.store.Push(line[1], f)
	case "push-fifo": // push-fifo NAME: a FIFO of that name beside the control socket
		path := filepath.Join(filepath.Dir(d.control), line[1])
		if err := unix.Mkfifo(path, 0o600); err != nil {
			return "", err
		}
		f, err := os.OpenFile(path, os.O_RDWR, 0)
		if err != nil {
			return "", err
		}
		defer f.Close()
		return "ok", d.store.Push(line[1], f)
	case "spawn": // a process as an upgrade starts it
		cmd := exec.Command(os.Args[0], "role=daemon", d.control)
		cmd.Env = append(os.Environ(), d.store.Environment()...)
		return "ok", cmd.Start()
	case "hang": // hang PATH: a process with a daemon below it that looks at a path
		cmd := exec.Command(os.Args[0], "role=hang", d.control, line[1])
		cmd.Env = append(os.Environ(), d.store.Environment()...)
		return "ok", cmd.Start()
	case "mainpid":
		pid, err := strconv.Atoi(line[1])
		return "ok", errorsJoin(err, d.store.MainPID(pid))
	case "say": // say STATE
		return "ok", errorsJoin(d.store.Notify(line[1]), reached(d.store))
	case "watchdog":
		return d.store.Watchdog().String(), nil
	case "remove":
		return "ok", d.store.Remove(line[1])
	case "ready":
		// The barrier makes the answer come after the keeper knows.
		return "ok", errorsJoin(d.store.Notify("READY=1\nSTATUS=all is well"), reached(d.store))
	case "read":
		b, err := io.ReadAll(io.NewSectionReader(d.files[line[1]], 0, 100))
		return string(b), err
	case "cloexec":
		flags, err := unix.FcntlInt(d.files[line[1]].Fd(), unix.F_GETFD, 0)
		return strconv.FormatBool(flags&unix.FD_CLOEXEC != 0), err
	case "moved": // the one copy there is has a high number
		base, err := Base()
		copies := 0
		for _, link := range openFDs("self") {
			if strings.Contains(link, "memfd:"+line[1]+" ") {
				copies++
			}
		}
		return strconv.FormatBool(int(d.files[line[1]].Fd()) >= base && copies == 1), err
	case "env":
		return strconv.Quote(os.Getenv(line[1])), nil
	case "exit":
		code, err := strconv.Atoi(line[1])
		if err == nil {
			os.Exit(code)
		}
		return "", err
	}
	return "", fmt.Errorf("unknown command %q", line)
}

func errorsJoin(errs ...error) error {
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}

func memFile(content string) (*os.File, error) {
	fd, err := unix.MemfdCreate(content, unix.MFD_CLOEXEC)
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(fd), content)
	_, err = f.WriteString(content)
	return f, err
}

// A keeperUnderTest is a real keeper process whose daemons talk to the test.
type keeperUnderTest struct {
	t       *testing.T
	dir     string
	cmd     *exec.Cmd
	log     chan string
	control *net.UnixListener
	exited  chan int
}

// patience bounds every wait for an event in these tests; it is long because a loaded machine is slow.
const patience = 60 * time.Second

func startKeeper(t *testing.T, command ...string) *keeperUnderTest {
	t.Helper()
	return startKeeperWith(t, func(dir string, command []string) []string {
		return slices.Concat([]string{os.Args[0], "role=keep", dir}, command)
	}, command...)
}

// startKeeperWith starts the keeper by the command line that line returns for its directory and what it is to run.
func startKeeperWith(t *testing.T, line func(dir string, command []string) []string, command ...string) *keeperUnderTest {
	t.Helper()
	k := &keeperUnderTest{t: t, dir: t.TempDir(), log: make(chan string, 10000), exited: make(chan int, 1)}
	control := filepath.Join(k.dir, "control")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: control, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	k.control = l
	if len(command) == 0 {
		command = []string{os.Args[0], "role=daemon", control}
	}
	argv := line(k.dir, command)
	k.cmd = exec.Command(argv[0], argv[1:]...)
	stderr, err := k.cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := k.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() { // ends with the keeper and its command; the cleanup waits for exited
		for in := bufio.NewScanner(stderr); in.Scan(); {
			k.log <- in.Text()
		}
		_ = k.cmd.Wait()
		k.exited <- k.cmd.ProcessState.ExitCode()
		close(k.exited)
	}()
	t.Cleanup(func() {
		_ = k.cmd.Process.Kill() // its daemons end when their control connection closes
		_ = l.Close()
		for range k.exited {
		}
		if t.Failed() {
			close(k.log)
			for line := range k.log {
				t.Log("keeper:", line)
			}
		}
	})
	return k
}

// A talk is the control connection to one daemon process.
type talk struct {
	t     *testing.T
	conn  net.Conn
	in    *bufio.Reader
	pid   int
	names string
}

// next returns the next daemon that the keeper starts.
func (k *keeperUnderTest) next() *talk {
	k.t.Helper()
	_ = k.control.SetDeadline(time.Now().Add(patience))
	conn, err := k.control.Accept()
	if err != nil {
		k.t.Fatal("no daemon was started: ", err)
	}
	k.t.Cleanup(func() { conn.Close() })
	d := &talk{t: k.t, conn: conn, in: bufio.NewReader(conn)}
	hello := d.line()
	pid, names, _ := strings.Cut(hello, " ")
	if d.pid, err = strconv.Atoi(pid); err != nil {
		k.t.Fatalf("the daemon failed: %s", hello)
	}
	d.names = names
	return d
}

func (d *talk) line() string {
	d.t.Helper()
	_ = d.conn.SetReadDeadline(time.Now().Add(patience))
	s, err := d.in.ReadString('\n')
	if err != nil {
		d.t.Fatal("the daemon did not answer: ", err)
	}
	return strings.TrimSuffix(s, "\n")
}

func (d *talk) say(line string) { fmt.Fprintln(d.conn, line) }

func (d *talk) ask(line, want string) {
	d.t.Helper()
	d.say(line)
	if got := d.line(); got != want {
		d.t.Fatalf("%s: got %q, want %q", line, got, want)
	}
}

func (d *talk) kill(s syscall.Signal) {
	d.t.Helper()
	if err := syscall.Kill(d.pid, s); err != nil {
		d.t.Fatal(err)
	}
}

func (k *keeperUnderTest) signal(s syscall.Signal) {
	k.t.Helper()
	if err := k.cmd.Process.Signal(s); err != nil {
		k.t.Fatal(err)
	}
}

// logged waits until the keeper logs something with that text in it.
func (k *keeperUnderTest) logged(text string) {
	k.t.Helper()
	timeout := time.After(patience)
	for {
		select {
		case line := <-k.log:
			if strings.Contains(line, text) {
				return
			}
		case <-timeout:
			k.t.Fatalf("the keeper did not log %q", text)
		}
	}
}

func (k *keeperUnderTest) wantExit(want int) {
	k.t.Helper()
	select {
	case got := <-k.exited:
		if got != want {
			k.t.Fatalf("the keeper ended with code %d, want %d", got, want)
		}
	case <-time.After(patience):
		k.t.Fatal("the keeper did not end")
	}
}

// holds counts the memfds of that content that the keeper has open.
func (k *keeperUnderTest) holds(name string) int {
	n := 0
	for _, link := range openFDs(strconv.Itoa(k.cmd.Process.Pid)) {
		if strings.Contains(link, "memfd:"+name+" ") {
			n++
		}
	}
	return n
}

// openFDs returns what the descriptors of a process point to, without the runtime's own.
func openFDs(pid string) []string {
	dir := "/proc/" + pid + "/fd"
	entries, _ := os.ReadDir(dir)
	var links []string
	for _, e := range entries {
		link, err := os.Readlink(filepath.Join(dir, e.Name()))
		if err == nil && !strings.Contains(link, "eventpoll") && !strings.Contains(link, "eventfd") && !strings.Contains(link, "pidfd") {
			links = append(links, link)
		}
	}
	return links
}

// reached returns when the supervisor has worked off all that the store sent.
func reached(s *Store) error {
	b, err := newBarrier()
	if err != nil {
		return err
	}
	defer b.close()
	return s.barrier(b)
}
