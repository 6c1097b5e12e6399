// Package daemon is the service: it takes the kernel's requests from an engine, fills cache objects from blob sources, and
// mounts, unmounts and describes images over an HTTP API on a unix socket.
//
// # The way of a request
//
// A pump goroutine reads a request and serves it itself, passing the turn to read on before anything that takes long
// (pump.go). The range asked for is widened to whole chunks; if they are
// present the answer is OK. Else what is absent of them, and of the read-ahead window behind them, is claimed (object.go),
// neighbours in the blob become one range request (transfer.go), and each batch of chunks is verified, written,
// marked and only then answered (transfer.land). A chunk that another request has claimed is waited for: one fetch a
// chunk, however many readers. What the domain's cache has in another object is copied from there instead of fetched
// (dedup.go), and verified all the same; it shares its space with the other one's where the file system can. What is read ahead holds back while readers miss elsewhere, until one waits for it. Prefetch claims like a reader does, but only while no reader waits (prefetch.go).
//
// The daemon is the one layer that tries again (fill.go, retry.go). What it does about a failure:
//
//	source fails            backoff of the object, 50 ms to 5 s and what Retry-After says, until the reader's deadline; then EIO
//	source fails for good   EIO at once
//	wrong bytes             never written; fetched again, three times in all; then EIO
//	cache is full           ENOSPC at once (EIO where the engine has no other error)
//	cache cannot be written EIO at once
//
// A reader that got an error may read again, and everything is tried again.
//
// # What it never does
//
// It touches no kernel structure and no descriptor of the kernel's (fscache does), decodes no image format (rafs does),
// and holds no request back for another image's sake.
//
// What it does with no daemon running is in offline.go: MountOffline mounts an image that is complete in the cache.
//
// # Invariants kept here
//
//   - I1, I3: transfer.land is the only place where bytes become visible; every doubt is answered with an error;
//   - I2: every request that Next returns is answered once: by fill's ready, or with fill's error;
//   - I5: settle decides what is present: what this boot wrote through the same chunk table, or what was read back and checked;
//     for mounts without a daemon also what was found right, synced, and not touched since (cacheSet);
//   - I8, I9: two images share an object only in one domain and only if their chunk tables agree, and each gives it its own source, for as
//     long as it is mounted; chunks are copied only from objects of the same domain;
//   - I10: a request is served by the goroutine that read it, and the turn to read is never kept for more than two
//     milliseconds; locks are an object's own, held for no longer than it takes to flip bits, and slots for fetches are an
//     object's own.
//
// golang.org/x/time/rate limits the prefetch's bandwidth: a token bucket with waiting that ends with a context. go.uber.org/zap
// is the logger the whole program has.
package daemon
