package main

import (
	"encoding/json"
	"errors"
	"fmt"

	"github.com/urfave/cli/v2"
)

func doctorCommand() *cli.Command {
	return &cli.Command{
		Name: "doctor", Usage: "say which engines work here, by trying them",
		Description: "It exits with 3 if none does.\n\nExample:\n   holdfast doctor --json",
		Flags:       []cli.Flag{jsonFlag()},
		Action:      doctor,
	}
}

// A finding is what trying an engine showed.
type finding struct {
	Engine string `json:"engine"`
	Works  bool   `json:"works"`
	Reason string `json:"reason,omitempty"` // why not
}

func doctor(c *cli.Context) error {
	if _, err := arguments(c); err != nil {
		return err
	}
	root, err := makeDirectory(c, "root")
	if err != nil {
		return err
	}
	var findings []finding
	none := true
	for _, k := range engineKinds {
		f := finding{Engine: k.name, Works: true}
		if err := tryEngine(k, root, false); err != nil {
			f.Works, f.Reason = false, err.Error()
		}
		none = none && !f.Works
		findings = append(findings, f)
	}
	if err := printFindings(c, findings); err != nil {
		return err
	}
	if none {
		return &exitError{exitKernel, errors.New("no engine works here")}
	}
	return nil
}

func printFindings(c *cli.Context, findings []finding) error {
	if c.Bool("json") {
		return printJSON(c, findings)
	}
	for _, f := range findings {
		verdict := "works"
		if !f.Works {
			verdict = f.Reason
		}
		if _, err := fmt.Fprintf(c.App.Writer, "%s: %s\n", f.Engine, verdict); err != nil {
			return err
		}
	}
	return nil
}

func jsonFlag() cli.Flag { return &cli.BoolFlag{Name: "json", Usage: "print JSON"} }

func printJSON(c *cli.Context, v any) error {
	enc := json.NewEncoder(c.App.Writer)
	enc.SetIndent("", "  ")
	return enc.Encode(v)
}
