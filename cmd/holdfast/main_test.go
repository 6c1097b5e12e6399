package main

import (
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"
	"github.com/urfave/cli/v2"
)

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){
		"holdfast": func() { os.Exit(run(os.Args)) },
	})
}

func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir:  "testdata/script",
		Cmds: map[string]func(*testscript.TestScript, bool, []string){"exitcode": exitCodeOf},
	})
}

// exitCodeOf runs a command that has to end with the given code: exitcode CODE COMMAND...
func exitCodeOf(ts *testscript.TestScript, _ bool, args []string) {
	if len(args) < 2 {
		ts.Fatalf("usage: exitcode CODE COMMAND...")
	}
	err := ts.Exec("sh", append([]string{"-c", `"$@"; code=$?; echo "exit code $code" >&2; [ $code = ` + args[0] + ` ]`, "sh"}, args[1:]...)...)
	if err != nil {
		ts.Fatalf("%s: want exit code %s", strings.Join(args[1:], " "), args[0])
	}
}

func TestSizeIsReadAndWritten(t *testing.T) {
	tests := []struct {
		in   string
		want int64 // -1: refused
		out  string
	}{
		{"0", 0, "0"}, {"4096", 4096, "4KiB"}, {"4K", 4096, "4KiB"}, {"4KiB", 4096, "4KiB"}, {"1M", 1 << 20, "1MiB"}, {"3GiB", 3 << 30, "3GiB"},
		{"5kB", 5000, "5000"}, {"5MB", 5e6, "5000000"}, {"1GB", 1e9, "1000000000"}, {"7B", 7, "7"}, {"1025", 1025, "1025"},
		{"", -1, ""}, {"K", -1, ""}, {"-1", -1, ""}, {"1.5M", -1, ""}, {"1KB", -1, ""}, {"1MM", -1, ""}, {"1 M", -1, ""},
		{"9223372036854775807", 1<<63 - 1, "9223372036854775807"}, {"9223372036854775808", -1, ""}, {"8796093022208M", -1, ""},
	}
	for _, tt := range tests {
		var s size
		err := s.Set(tt.in)
		switch {
		case tt.want < 0 && err == nil:
			t.Errorf("%q: taken as %d", tt.in, s.n)
		case tt.want >= 0 && (err != nil || s.n != tt.want || s.String() != tt.out):
			t.Errorf("%q: got %d %q, %v, want %d %q", tt.in, s.n, s.String(), err, tt.want, tt.out)
		}
	}
}

func TestEveryCommandHasAnExample(t *testing.T) {
	for _, c := range newApp(io.Discard, io.Discard).Commands {
		if !strings.Contains(c.Description, "Example:\n   holdfast "+c.Name) && !strings.Contains(c.Description, "Example:\n   holdfast keep -- holdfast "+c.Name) {
			t.Errorf("%s: no example in %q", c.Name, c.Description)
		}
	}
}

// A key of the configuration file is either a global flag or one of serve's.
func TestServeAndGlobalFlagsHaveDifferentNames(t *testing.T) {
	for _, f := range serveFlags() {
		if hasFlag(globalFlags(), f.Names()[0]) {
			t.Errorf("--%s is both", f.Names()[0])
		}
	}
}

func TestInheritedEngineIsUsedWhateverAutoWouldChoose(t *testing.T) {
	for _, k := range engineKinds {
		inherited := map[string]*os.File{k.name: os.Stdin, "object-1": os.Stdin}
		got, _, err := chooseEngine("auto", t.TempDir(), false, inherited)
		if err != nil || got.name != k.name {
			t.Errorf("got %q, %v, want %q", got.name, err, k.name)
		}
		for _, other := range engineKinds {
			if _, _, err := chooseEngine(other.name, t.TempDir(), false, inherited); (err == nil) != (other.name == k.name) {
				t.Errorf("%s asked for with %s inherited: %v", other.name, k.name, err)
			}
		}
	}
}

// A socket unit may hold a device that no engine of this kernel can use.
func TestInheritedLifelineOfNoUseIsLeftAside(t *testing.T) {
	before := engineKinds
	t.Cleanup(func() { engineKinds = before })
	works := func(string, bool) error { return nil }
	fails := func(string, bool) error { return errors.New("no") }
	for _, useless := range []bool{true, false} {
		unused := func(_ *os.File, unwanted bool) bool { return unwanted || useless }
		engineKinds = []engineKind{{name: "first", unused: unused, try: fails}, {name: "second", try: works}}
		inherited := map[string]*os.File{"first": os.Stdin}
		want := map[bool]string{true: "second", false: "first"}[useless]
		for asked, want := range map[string]string{"auto": want, "first": "first", "second": "second"} {
			got, _, err := chooseEngine(asked, t.TempDir(), false, inherited)
			if err != nil || got.name != want {
				t.Errorf("useless %v, %s asked for: got %q, %v, want %q", useless, asked, got.name, err, want)
			}
		}
	}
}

func TestFlagsWinOverTheConfigurationFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "c.toml")
	text := "root = \"/from/file\"\nrun = \"/from/file\"\nread-ahead = \"2MiB\"\nstreams = 3\nread-deadline = \"1s\"\n"
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	app := newApp(io.Discard, io.Discard)
	seen := false
	for _, c := range app.Commands {
		if c.Name == "serve" {
			c.Action = func(c *cli.Context) error {
				seen = true
				if err := setFlags(c, c.App.Metadata[configKey].(map[string]string)); err != nil {
					return err
				}
				if c.String("root") != "/from/file" || c.String("run") != "/from/flag" || bytesOf(c, "read-ahead") != 2<<20 ||
					c.Int("streams") != 9 || c.Duration("read-deadline").String() != "1s" {
					t.Errorf("root %s, run %s, read-ahead %d, streams %d, read-deadline %v", c.String("root"), c.String("run"),
						bytesOf(c, "read-ahead"), c.Int("streams"), c.Duration("read-deadline"))
				}
				return nil
			}
		}
	}
	if err := app.Run([]string{"holdfast", "--config", path, "--run", "/from/flag", "serve", "--streams", "9"}); err != nil || !seen {
		t.Fatalf("ran: %v, %v", seen, err)
	}
}
