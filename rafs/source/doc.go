// Package source fetches ranges of blobs from where they are kept: an OCI image layout or a directory on disk ([File]), or a
// registry ([Repository]).
//
// It never decodes or checks content (the caller holds the digests), never retries (the caller owns retries; what it may want
// to know for that is in [StatusError] and [IsPermanent]) and never writes a cache.
//
// Invariants:
//   - a reader yields exactly the bytes asked for, or an error: never fewer, never others as far as the answer's own
//     headers tell (I1; the digest tells the rest);
//   - every wait for a peer is bounded: a stall ends with [ErrStalled], and no answer is read further than the bytes asked
//     for, or than 8 MiB where nothing was said about its length (I9);
//   - a Repository shares nothing with another one, so neither a slow registry nor a credential reaches further than the image it
//     belongs to (I8, I10);
//   - no error, log field or String holds a credential, nor the address a registry redirects to, which is often a signed URL.
//
// Dependencies: github.com/google/go-containerregistry for what registries have made complicated, which is names, the Docker
// configuration file and its credential helpers, the first handshake and the token exchange. Its remote package is not used: its
// layers have no ranges, and it retries on its own. oras-go has ranges through a seekable body, but hides the status codes and
// the Retry-After header that the one who retries must see.
package source
