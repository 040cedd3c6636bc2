package snap

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"syscall"
	"testing"

	"example.com/raft/internal/vfs"
)

var (
	sweep     = flag.Bool("snap.sweep", false, "try many more crashes")
	crashSeed = flag.Uint64("snap.seed", 1, "seed of the crash tests")
)

var errDisk = errors.New("input/output error")

// model knows which snapshots a directory must and may hold.
type model struct {
	fs   *vfs.Mem
	held map[string][]byte // by name: the payload that Commit returned nil for
	name string            // what is being committed or removed, or ""
	next []byte            // its payload if that takes effect; nil: it is removed
	made int               // snapshots written so far, as salt and seed
}

// commit writes one snapshot of random length; some are aborted instead. After
// an error it tries whether the Writer is stuck with it, and aborts.
func (m *model) commit(name string, size int, abort bool) (err error) {
	m.made++
	data := payload(uint64(m.made), size)
	w, err := create(m.fs, testDir, name, []byte(name), uint64(m.made), 300)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, m.stuck(w))
		}
	}()
	for at := 0; at < size; at += 450 {
		if _, err := w.Write(data[at:min(at+450, size)]); err != nil {
			return err
		}
		if at%900 == 0 {
			if err := w.Sync(); err != nil {
				return err
			}
		}
	}
	if abort {
		return w.Abort()
	}
	m.name, m.next = name, data
	if err := w.Commit(); err != nil {
		return err
	}
	m.held[name], m.name = data, ""
	return w.Abort()
}

var errNotStuck = errors.New("a Writer goes on after an error")

// stuck checks that a Writer that has failed stays so, and aborts it.
func (m *model) stuck(w *Writer) error {
	for range 2 {
		if w.Commit() == nil || w.Sync() == nil || second(w.Write([]byte("x"))) == nil {
			return errNotStuck
		}
	}
	return errors.Join(w.Abort(), w.Abort())
}

func (m *model) remove(name string) error {
	m.name, m.next = name, nil
	if err := Remove(m.fs, testDir, name); err != nil {
		return err
	}
	delete(m.held, name)
	m.name = ""
	return nil
}

// workload commits, replaces, aborts and removes.
func (m *model) workload(rng *rand.Rand, steps int) error {
	for i := range steps {
		name := string(rune('a' + rng.IntN(3)))
		var err error
		if rng.IntN(5) == 0 && m.held[name] != nil {
			err = m.remove(name)
		} else {
			err = m.commit(name, rng.IntN(2000), rng.IntN(6) == 0)
		}
		if err == nil && i%4 == 3 {
			err = Clean(m.fs, testDir)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// check says what is illegal about the snapshots that a file system holds.
func (m *model) check(fs vfs.FS) error {
	names, err := List(fs, testDir)
	if err != nil {
		return err
	}
	for name := range m.held {
		if !slices.Contains(names, name) && (name != m.name || m.next != nil) {
			return fmt.Errorf("%s was committed and is missing among %v", name, names)
		}
	}
	for _, name := range names {
		header, data, err := read(fs, name)
		switch old, ok := m.held[name]; {
		case err != nil:
			return fmt.Errorf("%s does not read whole: %w", name, err)
		case string(header) != name:
			return fmt.Errorf("%s has the header %q", name, header)
		case ok && bytes.Equal(data, old), name == m.name && m.next != nil && bytes.Equal(data, m.next):
		default:
			return fmt.Errorf("%s holds what nobody has committed", name)
		}
	}
	return nil
}

func none(int) int  { return 0 }
func all(n int) int { return min(1, n-1) }

// after checks what a crash or a failure has left, goes on with it, and checks
// again after a power cut that loses everything unsynced.
func (m *model) after(fs *vfs.Mem) error {
	if err := m.check(fs); err != nil {
		return err
	}
	c := &model{fs: fs, held: maps.Clone(m.held), name: m.name, next: m.next, made: 1000}
	if err := errors.Join(Clean(fs, testDir), c.check(fs)); err != nil {
		return err
	}
	files, err := fs.List(testDir)
	if err == nil && strings.Contains(strings.Join(files, " "), "tmp") {
		return fmt.Errorf("Clean left %v", files)
	}
	for _, name := range []string{"a", "z"} { // over what is in doubt, if it is a
		if err := c.commit(name, 700, false); err != nil {
			return err
		}
	}
	if m.name != "" && m.name != "a" {
		c.name, c.next = m.name, m.next
	}
	return c.check(fs.CrashClone(none))
}

// crashes calls f with samples of what a power cut may leave.
func crashes(fs *vfs.Mem, rng *rand.Rand, samples int, f func(*vfs.Mem)) {
	f(fs.CrashClone(none))
	f(fs.CrashClone(all))
	f(fs.CrashClone(func(n int) int { return n / 2 })) // every sector garbage
	for i := range samples {
		most := i % 2 // half of the samples keep or lose nearly everything
		f(fs.CrashClone(func(n int) int {
			if i < samples/2 && rng.IntN(6) > 0 {
				return most
			}
			return rng.IntN(n)
		}))
	}
}

// TestCrashPoints cuts the power before every operation that can change the
// disk: the directory then holds what it held, or that and the new snapshot,
// and whatever Commit has returned nil for.
func TestCrashPoints(t *testing.T) {
	seeds, samples := 3, 8
	if *sweep {
		seeds, samples = 40, 30
	}
	for i := range seeds {
		seed := *crashSeed + uint64(i)
		m := &model{fs: newMem(seed), held: map[string][]byte{}}
		rng := rand.New(rand.NewPCG(seed, 2))
		points, tried := 0, 0
		m.fs.SetHook(func(op vfs.Op) error {
			if !op.Kind.Changes() {
				return nil
			}
			points++
			crashes(m.fs, rng, samples, func(c *vfs.Mem) {
				tried++
				if err := m.after(c); err != nil {
					t.Errorf("seed %d, crash before operation %d, %+v: %v", seed, points, op, err)
				}
			})
			if t.Failed() {
				return errDisk
			}
			return nil
		})
		if err := m.workload(rand.New(rand.NewPCG(seed, 3)), 25); err != nil {
			t.Fatal(err)
		}
		m.fs.SetHook(nil)
		if err := errors.Join(m.check(m.fs), m.check(m.fs.CrashClone(none))); err != nil {
			t.Fatal(err)
		}
		t.Logf("seed %d: %d snapshots, %d points, %d crashes", seed, m.made, points, tried)
	}
}

// TestDiskFailures lets every operation of a workload fail once: the error is
// reported and final, Abort leaves no temporary file, and nothing incomplete
// can be seen, by this process, the next one, or after a power cut.
func TestDiskFailures(t *testing.T) {
	for _, cause := range []error{errDisk, syscall.ENOSPC} {
		for seed := *crashSeed; seed < *crashSeed+4; seed++ {
			failures := 0
			for fail := 1; ; fail++ {
				m := &model{fs: newMem(seed), held: map[string][]byte{}}
				n, failed := fail, vfs.Op{Size: -1}
				m.fs.SetHook(func(op vfs.Op) error {
					if n--; n == 0 {
						failed = op
						return cause
					}
					return nil
				})
				err := m.workload(rand.New(rand.NewPCG(seed, 3)), 8)
				m.fs.SetHook(nil)
				if failed.Size < 0 {
					break // the workload has fewer operations
				}
				failures++
				if !errors.Is(err, cause) || errors.Is(err, errNotStuck) {
					t.Fatalf("seed %d, operation %d, %+v failed: %v", seed, fail, failed, err)
				}
				files, _ := m.fs.List(testDir) // it may not exist
				if strings.Contains(strings.Join(files, " "), "tmp") && failed.Kind != vfs.OpRemove && failed.Kind != vfs.OpSyncDir && failed.Kind != vfs.OpList {
					t.Fatalf("seed %d, operation %d, %+v failed, and there are %v", seed, fail, failed, files)
				}
				if m.fs.OpenFiles() != 0 {
					t.Fatalf("seed %d, operation %d, %+v failed, and %d files are open", seed, fail, failed, m.fs.OpenFiles())
				}
				cold := m.fs.Clone()
				cold.DropCaches()
				err = errors.Join(m.after(m.fs.Clone()), m.after(cold))
				crashes(m.fs, rand.New(rand.NewPCG(seed, uint64(fail))), 4, func(c *vfs.Mem) { err = errors.Join(err, m.after(c)) })
				if err != nil {
					t.Fatalf("seed %d, after operation %d, %+v failed: %v", seed, fail, failed, err)
				}
			}
			t.Logf("seed %d: %d failures of %v", seed, failures, cause)
			if failures < 50 {
				t.Errorf("only %d operations", failures)
			}
		}
	}
}

// TestDiskFull: whatever is the space that is left, a snapshot is whole or an
// error that says why, and Abort gives the space back.
func TestDiskFull(t *testing.T) {
	full := 0
	for capacity := int64(1); ; capacity += 50 {
		m := &model{fs: newMem(1), held: map[string][]byte{}}
		if err := m.commit("b", 500, false); err != nil {
			t.Fatal(err)
		}
		used := m.fs.Used()
		m.fs.SetCapacity(used + capacity)
		err := m.commit("a", 2000, false)
		if err2 := errors.Join(m.check(m.fs), m.check(m.fs.CrashClone(none))); err2 != nil {
			t.Fatalf("%d bytes are free: %v", capacity, err2)
		}
		if err == nil {
			break
		}
		full++
		if !errors.Is(err, syscall.ENOSPC) || errors.Is(err, errNotStuck) || m.fs.Used() != used || m.fs.OpenFiles() != 0 {
			t.Fatalf("%d bytes are free: %v; %d bytes are used after %d, %d files are open", capacity, err, m.fs.Used(), used, m.fs.OpenFiles())
		}
	}
	if full < 40 {
		t.Errorf("only %d sizes were too small", full)
	}
}
