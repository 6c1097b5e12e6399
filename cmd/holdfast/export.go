package main

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/urfave/cli/v2"

	"holdfast/fscache/plain"
	"holdfast/rafs/image"
)

func exportCommand() *cli.Command {
	return &cli.Command{
		Name: "export", Usage: "write an image as files that any EROFS host mounts without holdfast",
		ArgsUsage: "IMAGE DIR",
		Description: imageUsage + "No daemon is needed. Every chunk is checked against its digest; DIR appears when all of it is there. It must not exist, or be empty.\n" +
			"In it are the bootstrap, a file for each blob, and SHA256SUMS, to be signed and to be checked with sha256sum --check. The command\n" +
			"line that mounts it is printed: it needs Linux 6.12 with CONFIG_EROFS_FS_BACKED_BY_FILE and the fix of CVE-2026-31514 (6.18.22, 6.19.12, 7.0),\n" +
			"and util-linux 2.41; others take loop devices.\n\n" +
			"Example:\n   holdfast export docker://registry.example/python:rafs /srv/python",
		Flags: []cli.Flag{
			&cli.BoolFlag{Name: "verity", Usage: "have the kernel check every byte when it is read: fs-verity where the file system has it, else data for dm-verity made by veritysetup"},
			jsonFlag(),
		},
		Action: export,
	}
}

func export(c *cli.Context) error {
	ref, err := imageArgument(c, "IMAGE", "DIR")
	if err != nil {
		return err
	}
	meter := newMeter(os.Stderr)
	o := image.ExportOptions{Progress: meter.exporting}
	if c.Bool("verity") {
		o.Seal = plain.Seal
	}
	x, err := image.Export(c.Context, ref, c.Args().Get(1), o)
	meter.finish()
	if err != nil {
		return err
	}
	if c.Bool("json") {
		return printJSON(c, struct {
			*image.Exported
			Mount string `json:"mount"` // command line
		}{x, mountLine(x.Bootstrap, x.Devices)})
	}
	var errs []error
	say := func(format string, args ...any) {
		_, err := fmt.Fprintf(c.App.Writer, format, args...)
		errs = append(errs, err)
	}
	say("%s %s\n%s in %s\n", x.Ref, x.Digest, human(x.Size), x.Dir)
	for _, v := range x.Verity {
		say("%s\n", v)
	}
	say("mount it with:\n  %s\n", mountLine(x.Bootstrap, x.Devices))
	if len(x.Devices) > 0 {
		say("or through loop devices, with util-linux before 2.41, or a kernel before 6.12 or without the fix of CVE-2026-31514:\n  %s\n", loopLine(x.Bootstrap, x.Devices))
	}
	return errors.Join(errs...)
}

// mountLine is the command line that mounts an exported image on /mnt.
func mountLine(bootstrap string, devices []string) string {
	options := []string{"ro"}
	for _, d := range devices {
		options = append(options, "device="+d)
	}
	return "mount -t erofs -o " + quote(strings.Join(options, ",")) + " " + quote(bootstrap) + " /mnt"
}

// loopLine is the same with a loop device for each file.
func loopLine(bootstrap string, devices []string) string {
	options := []string{"ro"}
	for _, d := range devices {
		options = append(options, `device=$(losetup --read-only --find --show `+quote(d)+`)`)
	}
	return "mount -t erofs -o " + strings.Join(options, ",") + " " + quote(bootstrap) + " /mnt"
}

// quote makes one word of s for a shell.
func quote(s string) string {
	if strings.Trim(s, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789/._-=,+@%") == "" {
		return s
	}
	return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'"
}
