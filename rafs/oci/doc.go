// Package oci finds images where OCI keeps them, in an image layout on disk or a repository of a registry, and reads their
// indexes and manifests.
//
// A reference is oci:PATH[:TAG] or docker://HOST/REPOSITORY[:TAG|@DIGEST]. What follows the last colon of an oci reference is
// the tag if it holds no slash, so that a colon in the last element of PATH needs a tag or a trailing slash ("oci:/a:b/").
//
// It never writes, never retries, and knows nothing of what the layers hold.
//
// Invariants:
//   - whatever a [Store] returns was checked against the digest and size that led to it, but for index.json of a layout and
//     the blobs' data, whose readers check it (I1);
//   - no document of over 4 MiB is read, and no digest becomes part of a path or an address before it was seen to be the
//     hex of a sha256 (I9).
//
// Dependencies: github.com/opencontainers/image-spec and go-digest for the documents' types;
// github.com/google/go-containerregistry for the syntax of registry references.
package oci
