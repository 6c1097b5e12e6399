package main

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"

	"github.com/BurntSushi/toml"
	"github.com/urfave/cli/v2"
)

const defaultConfig = "/etc/holdfast/config.toml"

// configKey is where the values for serve's flags wait in the application's metadata until serve runs.
const configKey = "serve"

// environmentKey is where the configuration file's environment is in the application's metadata, whatever the command line says.
const environmentKey = "environment"

// loadConfig reads the configuration file and sets the global flags that it gives and the command line does not. Its keys are the
// names of global flags and of serve's.
func loadConfig(c *cli.Context) error {
	values, err := readConfig(c.String("config"), c.IsSet("config"))
	if err != nil {
		return named("holdfast", err)
	}
	own, forServe := map[string]string{}, map[string]string{}
	for key, v := range values {
		switch {
		case key != "config" && hasFlag(c.App.Flags, key):
			own[key] = v
		case hasFlag(serveFlags(), key):
			forServe[key] = v
		default:
			return named("holdfast", usagef("read --config %s: unknown key %q: the keys are the names of the flags of holdfast and of holdfast serve", c.String("config"), key))
		}
	}
	c.App.Metadata[configKey] = forServe
	c.App.Metadata[environmentKey] = values["environment"]
	return named("holdfast", setFlags(c, own))
}

// setFlags sets flags that were not given to the values in the configuration file.
func setFlags(c *cli.Context, values map[string]string) error {
	for key, v := range values {
		if c.IsSet(key) {
			continue
		}
		if err := c.Set(key, v); err != nil {
			return usagef("read --config %s: %s = %q: %w", c.String("config"), key, v, err)
		}
	}
	return nil
}

func hasFlag(flags []cli.Flag, name string) bool {
	return slices.ContainsFunc(flags, func(f cli.Flag) bool { return slices.Contains(f.Names(), name) })
}

// readConfig returns a configuration file's values as they would stand on the command line. Only the default file may be missing.
func readConfig(path string, given bool) (map[string]string, error) {
	b, err := os.ReadFile(path)
	if errors.Is(err, os.ErrNotExist) && !given {
		return nil, nil
	}
	if err != nil {
		return nil, usagef("read --config: %w", err)
	}
	var raw map[string]any
	if err := toml.Unmarshal(b, &raw); err != nil {
		return nil, usagef("read --config %s: %s", path, strings.TrimPrefix(err.Error(), "toml: "))
	}
	values := make(map[string]string, len(raw))
	for key, v := range raw {
		switch v.(type) {
		case string, bool, int64, float64:
			values[key] = fmt.Sprint(v)
		default:
			return nil, usagef("read --config %s: %q is no string, number or boolean", path, key)
		}
	}
	return values, nil
}
