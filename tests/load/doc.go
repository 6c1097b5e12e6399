// Package load puts readers on images whose every byte is known from its place: it makes such images, reads them at random while
// whatever it likes happens to the daemon, and says what no reader may ever see.
//
// What a reader gets is compared in full, always. The rules, by the names they have in failures:
//
//   - O1: bytes read are the image's;
//   - O2: no reader gets an errno;
//   - O3: no reader waits longer than a bound.
//
// It never starts, stops or asks a daemon.
package load
