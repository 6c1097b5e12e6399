// Package source fetches ranges of blobs from where they are kept: an OCI image layout or a directory on disk, or a registry.
//
// It never decodes or checks content (the caller holds the digests), never retries (the caller owns retries) and never
// writes a cache.
package source
