// Package systemd tests the units of packaging/systemd on a systemd that is PID 1: they are installed as a package would install them,
// with the binary under test in /usr/bin, and told what to do by systemctl. It only runs in the test machine, whose file system is
// thrown away after it; elsewhere all of it skips, and TestMain proves why.
//
// The machine is one for all tests, and so are the daemon's root and the cache device. Each test has a domain of its own, so that no
// test finds what another has cached, and leaves the service stopped and nothing mounted.
//
// The package holds no product code.
package systemd
