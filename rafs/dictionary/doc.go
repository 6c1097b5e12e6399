// Package dictionary opens RAFS images as chunk dictionaries for package convert: what a conversion finds in them it refers to
// instead of storing it again.
//
// It is apart from package convert because that knows no finished images, and from package image because that makes none.
//
// What this package never does: read chunk data, decide which chunks are used, retry.
//
// Invariant: a chunk is offered only by the digest and size in its blob's own chunk information, as package image has
// checked it; what a dictionary says wrongly ends in a digest that does not hold when the chunk is read, never in
// other bytes (I1, I9).
package dictionary
