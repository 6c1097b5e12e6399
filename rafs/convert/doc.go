// Package convert makes RAFS images of directories, tars and OCI images: a blob for each layer, one bootstrap for all
// of them merged, packed as an OCI image (FORMATS.md 1.7, 1.12) in an OCI image layout or a registry.
//
// The content is read once, as a stream, by one goroutine; compressing and writing go on beside it (package blob). The
// trees of the layers are held in memory, their content never is.
//
// dir:PATH and tar:PATH are root file systems: nothing in them is a whiteout. The same tree as a directory and as a tar
// gives the same image as far as a tar can say what a directory holds: no sockets, times only as exact as the tar's
// format has them, extended attributes only if the tool wrote them. oci: and docker:// sources are layers, merged by
// the rules of OCI and overlayfs whiteouts. POSIX ACLs are taken from the extended attributes they are stored in; the
// text form that some tools add for other systems is not read.
//
// Limits: of two conversions into one OCI layout that end at the same moment, one may lose its tag, while its blobs stay: run it
// again. A lock file would outlive a killed process and locks of the kernel do not reach every file system, so there is
// none. A killed conversion leaves a directory .convert-* in the layout. The next one lets it be, as nothing in a name tells
// whether its process, of another container or machine perhaps, still runs; whoever knows that none does may delete it.
//
// With a chunk dictionary the blobs of other images are blobs of the new one too, those that its files refer to: as devices of its
// bootstrap and as layers of its manifest, after its own. In a layout they are copied, in a registry taken from the repository where they are
// or sent. The bootstraps inside the blobs refer to them as well.
//
// What this package never does: follow a symbolic link, write outside the destination and its temporary directory, look
// at a file's bytes.
//
// Invariants:
//   - the same source and options give the same bytes, whatever Workers is and however goroutines are scheduled;
//   - a destination's tag is replaced in one step, when everything it stands for is stored;
//   - every blob, manifest and configuration read is checked against the digest that leads to it, blobs of a dictionary that
//     are copied too (I9);
//   - sizes in headers and documents are believed only as far as memory and time stay bounded (I9).
//
// Dependencies: archive/tar reads every tar dialect in use. github.com/klauspost/compress for gzip (faster than the standard
// library's) and zstd (which that does not have). github.com/containerd/continuity, which containerd takes its own layers
// with, for extended attributes and hard links of files on disk, as this package makes no system calls itself; pkg/xattr
// would have given the attributes only. github.com/google/go-containerregistry for pushing, with retries and
// authorisation; reading is package source's. The types of github.com/opencontainers/image-spec for the documents.
package convert
