// Package keyed has a lock for each cache object. It is for what is done by an object's name: making its file and deleting it.
//
// It never waits for anything but the same object's lock.
package keyed
