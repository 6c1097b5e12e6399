package link

import (
	"bytes"
	"io"
	"net"
	"testing"
	"time"
)

func echo(t *testing.T) string {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ln.Close() })
	go func() { // ends when the listener closes
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			go func() { io.Copy(c, c); c.Close() }() // ends with the connection
		}
	}()
	return ln.Addr().String()
}

func TestBytesArriveUnchangedNotBeforeRTTAndRateAllow(t *testing.T) {
	l, err := Start(echo(t), Config{RTT: 20 * time.Millisecond, Rate: 4 << 20})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	c, err := net.Dial("tcp", l.Addr())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	data := bytes.Repeat([]byte("0123456789abcdef"), 1<<16) // 1 MiB
	start := time.Now()
	go func() { c.Write(data); c.(*net.TCPConn).CloseWrite() }() // ends when all is written or c closes
	got, err := io.ReadAll(c)
	if err != nil || !bytes.Equal(got, data) {
		t.Fatalf("read %d bytes, %v: not what was sent (%d bytes)", len(got), err, len(data))
	}
	// 1 MiB at 4 MiB/s takes 250 ms each way, overlapping: a link that does not limit would need a few milliseconds.
	if d := time.Since(start); d < 250*time.Millisecond {
		t.Errorf("1 MiB crossed a link of 4 MiB/s and 20 ms in %v", d)
	}
	if up, down := l.Bytes(); up != int64(len(data)) || down != int64(len(data)) {
		t.Errorf("counted %d up and %d down, want %d each", up, down, len(data))
	}
}

func TestCloseEndsOpenConnections(t *testing.T) {
	l, err := Start(echo(t), Config{RTT: time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	c, err := net.Dial("tcp", l.Addr())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	c.Write([]byte("x"))
	if _, err := io.ReadFull(c, make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	l.Close()
	if _, err := io.ReadFull(c, make([]byte, 1)); err == nil {
		t.Error("read after Close succeeded")
	}
}
