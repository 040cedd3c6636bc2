package vfs

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

func newMem(seed uint64) *Mem { return NewMem(rand.New(rand.NewPCG(seed, 0))) }

func none(int) int { return 0 }
func all(int) int  { return 1 }

// TestContract holds both file systems to the same behaviour.
func TestContract(t *testing.T) {
	t.Run("os", func(t *testing.T) { contract(t, OS(), filepath.Join(t.TempDir(), "x", "y")) })
	t.Run("mem", func(t *testing.T) {
		m := newMem(1)
		contract(t, m, "/x/y")
		if n := m.OpenFiles(); n != 0 {
			t.Errorf("%d files are open", n)
		}
	})
}

// contract is what every FS does.
//
// More than 70 lines: each call builds on what the ones before it left.
func contract(t *testing.T, f FS, dir string) {
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	wantErr := func(err, target error) {
		t.Helper()
		if !errors.Is(err, target) {
			t.Fatalf("error %v, want %v", err, target)
		}
	}
	join := func(name string) string { return filepath.Join(dir, name) }
	must(f.MkdirAll(dir))
	must(f.MkdirAll(dir))
	a, err := f.Create(join("a"))
	must(err)
	_, err = f.Create(join("a"))
	wantErr(err, fs.ErrExist)
	_, err = f.Open(join("nothing"))
	wantErr(err, fs.ErrNotExist)
	if err := f.MkdirAll(join("a")); err == nil {
		t.Fatal("MkdirAll made a directory of a file")
	}
	data := []byte(strings.Repeat("0123456789", 1000))
	_, err = a.WriteAt(data, 5000)
	must(err)
	must(a.Sync())
	size, err := a.Size()
	must(err)
	if size != 15000 {
		t.Fatalf("size %d", size)
	}
	got := make([]byte, 20000)
	n, err := a.ReadAt(got, 0)
	wantErr(err, io.EOF)
	if n != 15000 || string(got[5000:n]) != string(data) || strings.Trim(string(got[:5000]), "\x00") != "" {
		t.Fatalf("read %d bytes, other than written", n)
	}
	must(a.Truncate(5005))
	must(a.Truncate(6000))
	n, _ = a.ReadAt(got, 5000)
	if string(got[:n]) != "01234"+strings.Repeat("\x00", 995) {
		t.Fatalf("after truncating: %q", got[:n])
	}
	before, err := f.Stat(join("a"))
	must(err)
	b, err := f.Create(join("b"))
	must(err)
	must(b.Close())
	must(f.Rename(join("a"), join("b")))
	must(f.SyncDir(dir))
	after, err := f.Stat(join("b"))
	must(err)
	if before != after || after.Size != 6000 || after.Dir || after.Inode == 0 {
		t.Fatalf("before the rename %+v, after it %+v", before, after)
	}
	if err := f.Rename(join("b"), filepath.Join(dir, "..", "b")); err == nil {
		t.Fatal("a rename across directories was made")
	}
	names, err := f.List(dir)
	must(err)
	if fmt.Sprint(names) != "[b]" {
		t.Fatalf("names %v", names)
	}
	must(f.Remove(join("b")))
	wantErr(f.Remove(join("b")), fs.ErrNotExist)
	_, err = a.WriteAt(data, 0) // still usable
	must(err)
	must(a.Close())
	wantErr(a.Close(), fs.ErrClosed)
	_, err = a.ReadAt(got, 0)
	wantErr(err, fs.ErrClosed)

	lock, err := f.Lock(join("lock"))
	must(err)
	_, err = f.Lock(join("lock"))
	wantErr(err, ErrLocked)
	must(lock.Close())
	lock, err = f.Lock(join("lock"))
	must(err)
	must(lock.Close())
}

func TestMkdirAllNames(t *testing.T) {
	m := newMem(1)
	if err := m.MkdirAll("a/b"); err != nil {
		t.Fatal(err)
	}
	if info, err := m.Stat("/a/b/"); err != nil || !info.Dir {
		t.Fatalf("%+v, %v", info, err)
	}
}

// TestMkdirAllAfterKill: a directory that a process left unsynced is durable
// once MkdirAll has returned, though it exists.
func TestMkdirAllAfterKill(t *testing.T) {
	m := newMem(1)
	if err := errors.Join(m.mkdir("/a"), m.mkdir("/a/b")); err != nil {
		t.Fatal(err)
	}
	m.Kill()
	if err := m.MkdirAll("/a/b"); err != nil {
		t.Fatal(err)
	}
	m.Crash(none)
	if info, err := m.Stat("/a/b"); err != nil || !info.Dir {
		t.Fatalf("after a power cut: %+v, %v", info, err)
	}
}

// TestCrash: what is synced stays, of the rest every sector and every change
// of a directory may be old or new, and old handles are dead.
func TestCrash(t *testing.T) {
	m := newMem(1)
	f, _ := m.Create("/f")
	write := func(b byte) {
		if _, err := f.WriteAt([]byte(strings.Repeat(string(b), 1024)), 0); err != nil {
			t.Fatal(err)
		}
	}
	write('a')
	if err := errors.Join(f.Sync(), m.SyncDir("/")); err != nil {
		t.Fatal(err)
	}
	write('b')
	if _, err := m.Create("/g"); err != nil {
		t.Fatal(err)
	}
	if err := m.Rename("/f", "/h"); err != nil {
		t.Fatal(err)
	}
	seen := map[string]int{}
	for i := range 64 { // 2 creations or renames, 2 sectors
		at := i
		c := m.CrashClone(func(n int) int {
			v := at % n
			at /= n
			return v
		})
		names, _ := c.List("/")
		g, err := c.Open("/f")
		if err != nil {
			g, err = c.Open("/h")
		}
		if err != nil {
			t.Fatal(err)
		}
		got := make([]byte, 1024)
		if _, err := g.ReadAt(got, 0); err != nil {
			t.Fatal(err)
		}
		state := strings.Join(names, "")
		for s := 0; s < 1024; s += 512 {
			switch p := string(got[s : s+512]); {
			case p == strings.Repeat("a", 512):
				state += " old"
			case p == strings.Repeat("b", 512):
				state += " new"
			case strings.Trim(p, "ab") == "":
				state += " torn"
			default:
				state += " garbage"
			}
		}
		seen[state]++
	}
	if len(seen) != 64 {
		t.Fatalf("%d different outcomes of 64: %v", len(seen), seen)
	}
	m.Crash(none)
	if _, err := f.ReadAt(make([]byte, 1), 0); !errors.Is(err, ErrGone) {
		t.Fatalf("reading by an old handle: %v", err)
	}
	if err := f.Sync(); !errors.Is(err, ErrGone) {
		t.Fatalf("syncing an old handle: %v", err)
	}
}

// TestCrashIsDeterministic: equal seeds give equal bytes.
func TestCrashIsDeterministic(t *testing.T) {
	run := func() string {
		m := newMem(7)
		f, _ := m.Create("/f")
		_, _ = f.WriteAt([]byte(strings.Repeat("x", 9000)), 0)
		_ = m.SyncDir("/")
		m.Crash(rand.New(rand.NewPCG(3, 3)).IntN)
		f, _ = m.Open("/f")
		b := make([]byte, 9000)
		n, _ := f.ReadAt(b, 0)
		return string(b[:n])
	}
	if first, second := run(), run(); first != second {
		t.Fatal("two runs of one seed differ")
	}
}

// TestFailedSync: the data reads fine, a second sync returns nil, and a power
// cut or a cold cache shows that it is not on disk.
func TestFailedSync(t *testing.T) {
	broken := errors.New("broken")
	lost := 0
	for seed := range uint64(20) {
		m := newMem(seed)
		f, _ := m.Create("/f")
		if err := m.SyncDir("/"); err != nil {
			t.Fatal(err)
		}
		_, _ = f.WriteAt([]byte(strings.Repeat("a", 8192)), 0)
		if err := f.Sync(); err != nil {
			t.Fatal(err)
		}
		_, _ = f.WriteAt([]byte(strings.Repeat("b", 8192)), 0)
		m.SetHook(func(op Op) error {
			if op.Kind == OpSync {
				return broken
			}
			return nil
		})
		if err := f.Sync(); !errors.Is(err, broken) {
			t.Fatal(err)
		}
		m.SetHook(nil)
		read := func(m *Mem) string {
			f, err := m.Open("/f")
			if err != nil {
				t.Fatal(err)
			}
			b := make([]byte, 8192)
			if _, err := f.ReadAt(b, 0); err != nil {
				t.Fatal(err)
			}
			return string(b)
		}
		if read(m) != strings.Repeat("b", 8192) {
			t.Fatal("the cache lost what was written")
		}
		if err := f.Sync(); err != nil {
			t.Fatal(err)
		}
		crashed := read(m.CrashClone(all))
		m.DropCaches()
		if crashed != read(m) {
			t.Fatal("a cold cache and a power cut differ")
		}
		if strings.Contains(crashed, "a") {
			lost++
		}
	}
	if lost < 15 {
		t.Fatalf("only %d of 20 failed syncs lost something", lost)
	}
}

func TestFaults(t *testing.T) {
	m := newMem(1)
	m.SetCapacity(10_000)
	f, _ := m.Create("/f")
	if _, err := f.WriteAt(make([]byte, 8000), 0); err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteAt(make([]byte, 8000), 8000); !errors.Is(err, syscall.ENOSPC) || !IsNoSpace(err) {
		t.Fatalf("beyond the capacity: %v", err)
	}
	if err := m.FlipBit("/f", 4100, 3); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 1)
	if _, err := f.ReadAt(b, 4100); err != nil || b[0] != 8 {
		t.Fatalf("after the flip: %v, %v", b, err)
	}
	if err := m.Remove("/f"); err != nil || m.Used() != 0 {
		t.Fatalf("%d bytes are used after Remove, %v", m.Used(), err)
	}
	var ops []string
	m.SetHook(func(op Op) error { ops = append(ops, op.Kind.String()); return nil })
	g, _ := m.Create("/g")
	_, _ = g.WriteAt([]byte("x"), 0)
	_ = g.Sync()
	if got := strings.Join(ops, " "); got != "create write sync" {
		t.Fatalf("the hook saw %q", got)
	}
	m.Kill()
	if n := m.OpenFiles(); n != 0 {
		t.Fatalf("%d files are open after Kill", n)
	}
}
