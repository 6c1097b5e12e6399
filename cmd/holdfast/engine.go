package main

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"go.uber.org/zap"

	"holdfast/daemon"
	"holdfast/fscache"
	"holdfast/fscache/cachefiles"
	"holdfast/fscache/fanotify"
)

// An engineKind is an engine as the command line knows it.
type engineKind struct {
	name string
	// try says why the engine cannot work here with its cache in dir, or nil. With unsafe it does not ask whether the kernel is
	// known to give wrong bytes.
	try func(dir string, unsafe bool) error
	// unused says of an inherited lifeline whether it may be left aside, because nothing is mounted through it and the engine cannot work, or is
	// unwanted; nil: never.
	unused func(lifeline *os.File, unwanted bool) bool
	open   func(engineConfig) (fscache.Engine, error)
}

// An engineConfig is what an engine is opened with.
type engineConfig struct {
	dir       string
	inherited fscache.Inherited
	inbox     fscache.Inbox
	holder    fscache.Holder
	reserved  *fanotify.Reservation
	limits    fscache.Limits
	unsafe    bool
	log       *zap.Logger
}

// engineKinds are tried in this order by --engine auto: where a kernel has both, readers of a cachefiles mount whose device is
// lost get errors, those of a fanotify mount whose group is lost get zeros.
var engineKinds = []engineKind{
	{
		name:   cachefiles.Name,
		try:    func(dir string, _ bool) error { return cachefiles.Available(dir) },
		unused: cachefiles.Unused,
		open: func(c engineConfig) (fscache.Engine, error) {
			return cachefiles.Open(cachefiles.Config{Dir: c.dir, Limits: c.limits, Inherited: c.inherited, Inbox: c.inbox, Holder: c.holder, Log: c.log})
		},
	},
	{
		name: fanotify.Name,
		try: func(dir string, unsafe bool) error {
			if err := fanotify.Available(dir); err != nil || unsafe {
				return err
			}
			return fanotify.CheckKernel()
		},
		open: func(c engineConfig) (fscache.Engine, error) {
			return fanotify.Open(fanotify.Config{
				Dir: c.dir, Inherited: c.inherited, Inbox: c.inbox, Holder: c.holder, Reserved: c.reserved, AllowUnsafeKernel: c.unsafe, Log: c.log,
			})
		},
	},
}

func engineNames() string {
	var names []string
	for _, k := range engineKinds {
		names = append(names, k.name)
	}
	return strings.Join(names, ", ")
}

// chooseEngine returns the engine whose lifeline was inherited and is of use, that was asked for by name, or is the first that works here, and why it is that one.
func chooseEngine(asked, root string, unsafe bool, inherited map[string]*os.File) (engineKind, string, error) {
	for _, k := range engineKinds {
		lifeline := inherited[k.name]
		if lifeline == nil || k.unused != nil && k.unused(lifeline, asked != "auto" && asked != k.name) {
			continue
		}
		if asked != "auto" && asked != k.name {
			return k, "", fmt.Errorf("the supervisor holds mounts of the %s engine: serve them with --engine %s, and unmount them before changing the engine", k.name, k.name)
		}
		return k, "the supervisor holds its descriptor", nil
	}
	var reasons []error
	for _, k := range engineKinds {
		switch {
		case asked == k.name:
			return k, "chosen by --engine", nil
		case asked != "auto":
			continue
		}
		err := tryEngine(k, root, unsafe)
		if err == nil {
			return k, "the first of " + engineNames() + " that works here", nil
		}
		reasons = append(reasons, err)
	}
	if asked != "auto" {
		return engineKind{}, "", usagef("--engine=%q: want auto, or one of %s", asked, engineNames())
	}
	return engineKind{}, "", &exitError{exitKernel, fmt.Errorf("no engine works here: %w", errors.Join(reasons...))}
}

// tryEngine tries an engine in its cache directory below root, which is made.
func tryEngine(k engineKind, root string, unsafe bool) error {
	dir := daemon.CacheDir(root, k.name)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	return k.try(dir, unsafe)
}
