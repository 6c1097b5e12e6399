// Command deps makes sure that the Debian packages it is given are installed: as root it installs what is missing, otherwise it
// says what to run.
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"

	"holdfast/tests/vm"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	log := func(s string) { fmt.Fprintln(os.Stderr, "deps:", s) }
	if err := vm.EnsurePackages(ctx, log, os.Args[1:]); err != nil {
		log(err.Error())
		os.Exit(1)
	}
}
