package fanotify

import (
	"testing"

	"holdfast/fscache"
)

// BenchSlot lends, fills and frees slots as Next and Answer do.
func BenchSlot(b *testing.B, inbox fscache.Inbox) {
	e := &Engine{inbox: inbox, limit: 1}
	b.ReportAllocs()
	for b.Loop() {
		slot, p, err := e.take()
		if err != nil {
			b.Fatal(err)
		}
		unidentify(p)
		identify(p, inode{dev: 1, ino: 2})
		e.free(slot)
	}
}
