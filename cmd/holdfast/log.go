package main

import (
	"os"

	"github.com/urfave/cli/v2"
	"github.com/vbauerster/cupwriter"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
)

// newLog makes the log of a long-lived command, on standard error.
func newLog(c *cli.Context) (*zap.Logger, error) {
	level, err := zapcore.ParseLevel(c.String("log-level"))
	if err != nil || level > zapcore.ErrorLevel {
		return nil, usagef("--log-level=%q: want debug, info, warn or error", c.String("log-level"))
	}
	config := zap.NewProductionEncoderConfig()
	config.EncodeTime = zapcore.RFC3339NanoTimeEncoder
	config.EncodeDuration = zapcore.StringDurationEncoder
	format := c.String("log-format")
	if format == "auto" {
		format = "json"
		if isTerminal(os.Stderr) {
			format = "console"
		}
	}
	var encoder zapcore.Encoder
	switch format {
	case "json":
		encoder = zapcore.NewJSONEncoder(config)
	case "console":
		encoder = zapcore.NewConsoleEncoder(config)
	default:
		return nil, usagef("--log-format=%q: want json, console or auto", format)
	}
	return zap.New(zapcore.NewCore(encoder, zapcore.Lock(os.Stderr), level)), nil
}

func isTerminal(f *os.File) bool { return cupwriter.New(f, false).IsTerminal() }
