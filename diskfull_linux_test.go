package raft

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"syscall"
	"testing"
)

// TestSmallFileSystems runs testSmallFileSystems in a user and mount namespace of
// its own, in which it can mount what is not its to mount elsewhere.
func TestSmallFileSystems(t *testing.T) {
	const inside = "RAFT_TEST_SMALL_FILE_SYSTEMS"
	if dir := os.Getenv(inside); dir != "" {
		testSmallFileSystems(t, dir)
		return
	}
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	c := exec.Command(exe, "-test.run=^TestSmallFileSystems$", "-test.v", "-test.timeout=1m")
	c.Env = append(os.Environ(), inside+"="+dir)
	c.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  syscall.CLONE_NEWUSER | syscall.CLONE_NEWNS,
		UidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getuid(), Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getgid(), Size: 1}},
		Pdeathsig:   syscall.SIGKILL,
	}
	out, err := c.CombinedOutput()
	var exit *exec.ExitError
	switch {
	case errors.As(err, &exit) && exit.ExitCode() == cantMount:
		t.Skipf("this machine lets nobody mount a file system in a user namespace:\n%s", out)
	case err != nil && !errors.As(err, &exit):
		t.Skipf("this machine has no user namespaces: %v", err)
	case err != nil:
		t.Fatalf("%v\n%s", err, out)
	}
	t.Logf("%s", out)
}

const cantMount = 77 // exit code

// testSmallFileSystems fills the real file system of a leader's log, of 12 MiB,
// and frees it again.
func testSmallFileSystems(t *testing.T, dir string) {
	for i := range 3 {
		at := filepath.Join(dir, strconv.Itoa(i))
		if err := os.Mkdir(at, 0o700); err != nil {
			t.Fatal(err)
		}
		if err := syscall.Mount("raft", at, "tmpfs", 0, "size=12m"); err != nil {
			fmt.Println("mount:", err)
			os.Exit(cantMount)
		}
		defer syscall.Unmount(at, syscall.MNT_DETACH)
	}
	h := NewHarness(t, 3, WithDisk(dir), WithConfig(func(_ int, c *Config) { c.SnapshotEveryBytes, c.KeepLogBytes = 2<<20, 1<<20 }))
	defer h.Shutdown()
	old, _ := h.CheckSingleLeader()
	w := newWriter()
	filler := filepath.Join(dir, strconv.Itoa(old), "filler")
	fillFileSystem(t, filler)
	for k := 0; !diskFull(h, old); k++ {
		if err := w.write(h, (old+1+k%2)%3); err != nil || k > 2000 {
			t.Fatalf("write %d: %v", k, err)
		}
	}
	if !h.eventually(func() bool { leader, _ := h.CheckSingleLeader(); return leader != old }) {
		t.Fatal("a node whose disk is full leads on")
	}
	for k := range 100 { // the others take their snapshots and let the log go
		if err := w.write(h, (old+1+k%2)%3); err != nil {
			t.Fatalf("write %d with a full disk at one node: %v", k, err)
		}
	}
	if err := os.Remove(filler); err != nil {
		t.Fatal(err)
	}
	if !h.eventually(func() bool { return !diskFull(h, old) && w.write(h, old) == nil }) {
		t.Fatalf("with space again node %d is not back: %+v", old, h.Server(old).Status())
	}
	h.CheckCommittedN(bulky(w.next-1), 3)
	w.check(t, h)
}

// fillFileSystem writes a file until there is no space left.
func fillFileSystem(t *testing.T, name string) {
	f, err := os.Create(name)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for n := 64 << 10; n >= 512; {
		if _, err = f.Write(make([]byte, n)); err != nil {
			n /= 2
		}
	}
	if !errors.Is(err, syscall.ENOSPC) {
		t.Fatalf("filling %s ended with %v", name, err)
	}
}
