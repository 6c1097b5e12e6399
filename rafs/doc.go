// Package rafs holds the plain data that describe a lazily loaded image: codecs, digests, blobs and chunk tables.
//
// An image is a bootstrap (EROFS metadata, complete before the mount) and objects, one per blob. An object is a flat
// address space of chunks that start on 4 KiB boundaries; a [Table] says for every byte of it where in the blob the
// bytes are stored, how they are encoded and what digest they must have. The sub-packages make such tables from image
// formats, write them, and fetch the bytes they point to; the daemon only ever sees the data in this package.
//
// What this package never does: read files, talk to a network, know which kernel engine asked.
//
// Invariants:
//   - a Table covers every byte of its object exactly once, gaps between chunks included (as zero rows);
//   - a row's digest is over the uncompressed bytes, and nothing decoded is handed on before [Digest] was checked (I3);
//   - every value that comes from an image was bounded against the limits below before memory was allocated (I9).
//
// Dependency: github.com/zeebo/blake3, whose assembly takes 2.4 us for 4 KiB and 250 us for 1 MiB (AVX2) and allocates
// nothing; lukechampine.com/blake3 takes 29 us and 450 us, and small files are most files.
package rafs
