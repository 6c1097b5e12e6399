// Package image opens RAFS v6 images wherever they are kept, says what a daemon must know to serve them, and checks and
// describes them.
//
// A reference is one of
//
//	oci:PATH[:TAG]                an OCI image layout on disk
//	docker://HOST/REPOSITORY[:TAG|@DIGEST]   a registry
//	rafs:BOOTSTRAP[,BLOBDIR]      a bare bootstrap and a directory with the blobs, named by id
//
// the first two as package oci reads them. What follows the last comma of a rafs reference is BLOBDIR; without one it is
// the bootstrap's directory.
//
// An opened [Image] holds the bootstrap as bytes and one chunk table per blob; the file tree is in memory only while
// [Check], [Export] and [Inspect] run.
//
// It never writes a cache, mounts, or retries: what fails for a reason that may go away fails with an error that is not
// marked with source.Permanent, and the caller decides.
//
// Invariants:
//   - manifests, the bootstrap's layer and everything in them are checked against the digest and size that led to them,
//     from the manifest's on; chunk information against the bootstrap (I1);
//   - every list and buffer is bounded before it is allocated: manifests by 4 MiB, a bootstrap by 1 GiB and by what its
//     compressed layer can honestly hold (I9);
//   - no digest or id of an image becomes part of a path or an address before it was seen to be hex (I9);
//   - an image shares no connection and no credential with another one (I8, I10).
//
// Dependencies: github.com/opencontainers/image-spec for the documents' types; github.com/google/go-containerregistry/pkg/authn
// for the type of credentials; github.com/klauspost/compress/gzip, which is the standard one, faster.
package image
