//go:build crashpoints

package state

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"
)

// TestKilledAtEachPointWhatIsOnRecordIsBeforeOrAfter kills a process at each point of this package and looks at what it left.
func TestKilledAtEachPointWhatIsOnRecordIsBeforeOrAfter(t *testing.T) {
	for at, want := range map[string]string{
		// mounts, settled objects; held objects, pending; messages
		"state.record-mount.before-commit:1":  "[] 0 [] 0 0",
		"state.record-mount.after-commit:1":   "[mount-a] 0 [] 0 0",
		"state.settle-object.before-commit:1": "[mount-a] 0 [] 0 0",
		"state.settle-object.after-commit:1":  "[mount-a] 1 [] 0 0",
		"state.forget-mount.before-commit:1":  "[mount-a] 1 [] 0 0",
		"state.forget-mount.after-commit:1":   "[] 1 [] 0 0",
		"state.record-object.before-commit:1": "[] 1 [] 0 0",
		"state.record-object.after-commit:1":  "[] 1 [o0] 0 0",
		"state.record-object.before-commit:2": "[] 1 [o0] 0 0",
		"state.record-object.after-commit:2":  "[] 1 [o0 o1] 0 0",
		"state.forget-object.before-commit:1": "[] 1 [o0 o1] 0 0",
		"state.forget-object.after-commit:1":  "[] 1 [o1] 0 0",
		"state.set-pending.before-commit:1":   "[] 1 [o1] 0 0",
		"state.set-pending.after-commit:1":    "[] 1 [o1] 1 0",
		"state.set-pending.before-commit:2":   "[] 1 [o1] 1 0",
		"state.set-pending.after-commit:2":    "[] 1 [o1] 0 0",
		"state.inbox-take.before-lent:1":      "[] 1 [o1] 0 0",
		"state.inbox-take.after-lent:1":       "[] 1 [o1] 0 0",
		"state.inbox-free.before-free:1":      "[] 1 [o1] 0 1",
		"state.inbox-free.after-free:1":       "[] 1 [o1] 0 0",
		"state.inbox-take.before-lent:2":      "[] 1 [o1] 0 0",
		"state.inbox-take.after-lent:2":       "[] 1 [o1] 0 0", // the slot that had the first message
		"state.inbox-free.before-free:2":      "[] 1 [o1] 0 1",
		"state.inbox-free.after-free:2":       "[] 1 [o1] 0 0",
	} {
		t.Run(at, func(t *testing.T) {
			dir, marks := tmpfs(t), t.TempDir()
			v := startVictim(t, "calls", dir, "HOLDFAST_CRASH_DIR="+marks, "HOLDFAST_CRASH="+at)
			defer v.close()
			_ = v.cmd.Wait()
			if _, err := os.Stat(filepath.Join(marks, "killed-0")); err != nil {
				t.Fatalf("it was not killed: %v", err)
			}
			db := open1(t, filepath.Join(dir, "state.db"))
			s := openSession(t, filepath.Join(dir, "session.db"), "boot-a")
			e, err1 := db.Export()
			e2, err2 := s.Export()
			if err1 != nil || err2 != nil {
				t.Fatal(err1, err2)
			}
			mounts, held, settled := []string{}, []string{}, 0
			for _, m := range e.Mounts {
				mounts = append(mounts, m.ID)
			}
			for _, o := range e.Objects {
				if o.Boot != "" {
					settled++
				}
			}
			for _, o := range e2.Objects {
				held = append(held, o.Name)
			}
			got := fmt.Sprint(mounts, settled, held, len(e2.Pending), len(read(t, filepath.Join(dir, "inbox"))))
			if got != want {
				t.Errorf("left %s, want %s", got, want)
			}
		})
	}
}
