package vm

import (
	"slices"
	"testing"
)

func TestLostOptionsAreNamed(t *testing.T) {
	fragment := []byte("# A comment.\nCONFIG_A=y\nCONFIG_B=y\n# CONFIG_C is not set\n# CONFIG_D is not set\nCONFIG_N=8\nCONFIG_M=8\n")
	config := []byte("CONFIG_A=y\n# CONFIG_B is not set\nCONFIG_C=y\nCONFIG_N=8\nCONFIG_M=64\nCONFIG_AB=y\n")
	want := []string{"CONFIG_B=y", "# CONFIG_C is not set", "CONFIG_M=8"}
	if got := lostOptions(fragment, config); !slices.Equal(got, want) {
		t.Errorf("lost options %q, want %q", got, want)
	}
}

func TestEverySeriesHasAConfiguration(t *testing.T) {
	for _, s := range Series {
		if _, err := kernelFiles.ReadFile("kernel/fragment-" + s + ".config"); err != nil {
			t.Error(err)
		}
	}
}

func TestUnknownSeriesIsRefused(t *testing.T) {
	if _, err := EnsureKernel(t.Context(), "2.4", t.Output()); err == nil {
		t.Error("a kernel series without a fragment was accepted")
	}
}

func TestComplaintsAreFoundAmongOrdinaryLines(t *testing.T) {
	bad := []string{
		"[   12.0] WARNING: CPU: 1 PID: 77 at fs/cachefiles/ondemand.c:60 cachefiles_ondemand_fd_release+0x1/0x2",
		"[   12.0] BUG: kernel NULL pointer dereference, address: 0000000000000000",
		"[   12.0] kernel BUG at fs/cachefiles/key.c:47!",
		"[   12.0] Oops: general protection fault, probably for non-canonical address 0xdead000000000100: 0000 [#1] SMP",
		"[   12.0] INFO: task python3:88 blocked for more than 60 seconds.",
		"[   12.0] Kernel panic - not syncing: Attempted to kill init! exitcode=0x00000200",
		"[   12.0] refcount_t: underflow; use-after-free.",
	}
	log := "[    0.9] fuse: init (API version 7.41)\n[    1.0] EXT4-fs (vda): mounted filesystem r/w\n"
	for _, l := range bad {
		log += l + "\n[   13.0] random: crng init done\n"
	}
	if got := complaints(log); !slices.Equal(got, bad) {
		t.Errorf("found %q, want %q", got, bad)
	}
}
