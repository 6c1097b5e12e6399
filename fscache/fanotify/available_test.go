package fanotify

import (
	"testing"
)

func TestAvailableHere(t *testing.T) {
	if err := Available(t.TempDir()); err != nil {
		t.Fatal(err)
	}
	t.Log(Available("/dev/shm"))
}
