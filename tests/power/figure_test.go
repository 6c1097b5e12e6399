package power

import "testing"

// A figure is what the cuts on one file system cost.
type figure struct {
	rounds, synced int
	loss
}

func (f *figure) add(read *source, k known, l loss) {
	f.rounds++
	f.Before += max(l.Before, read.size()-l.Again) // more came between the count and the cut
	f.Again += l.Again
	if k.has(markSynced) {
		f.synced++
	}
}

// print shows it: of what had been fetched of the image that is read, what was still there afterwards. Of the prefetched one all was, or the
// test failed.
func (f *figure) print(t *testing.T, read *source) {
	still := max(int64(f.rounds)*read.size()-f.Again, 0)
	t.Logf("%d cuts, 0 wrong bytes. Of the image being read: %.1f MB fetched by then, %.1f MB of it kept (%d%%). Prefetched: %d cuts when all of it was known to be durable, none of it fetched again",
		f.rounds, float64(f.Before)/1e6, float64(still)/1e6, 100*still/max(f.Before, 1), f.synced)
}
