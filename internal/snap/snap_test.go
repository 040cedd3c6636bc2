package snap

import (
	"bytes"
	"errors"
	"io"
	"io/fs"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"testing/iotest"

	"example.com/raft/internal/vfs"
)

const testDir = "data/snap"

func newMem(seed uint64) *vfs.Mem { return vfs.NewMem(rand.New(rand.NewPCG(seed, 1))) }

// payload returns n bytes that differ from place to place and by seed.
func payload(seed uint64, n int) []byte {
	rng := rand.New(rand.NewPCG(seed, 7))
	p := make([]byte, n)
	for i := range p {
		p[i] = byte(rng.Uint32())
	}
	return p
}

// write makes a snapshot with a given salt and size of blocks.
func write(t testing.TB, fs vfs.FS, name string, header, data []byte, salt uint64, block int) {
	t.Helper()
	w, err := create(fs, testDir, name, header, salt, block)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write(data); err != nil {
		t.Fatal(err)
	}
	if err := w.Commit(); err != nil {
		t.Fatal(err)
	}
}

// read returns the header and the payload of a snapshot.
func read(fs vfs.FS, name string) (header, data []byte, err error) {
	r, err := Open(fs, testDir, name)
	if err != nil {
		return nil, nil, err
	}
	defer r.Close()
	data = make([]byte, r.Size())
	_, err = r.ReadAt(data, 0)
	return r.Header(), data, err
}

func listed(t testing.TB, fs vfs.FS) []string {
	t.Helper()
	names, err := List(fs, testDir)
	if err != nil {
		t.Fatal(err)
	}
	return names
}

// TestRoundTrip: what was written is read, whatever its length and the pieces
// in which it came.
func TestRoundTrip(t *testing.T) {
	for _, size := range []int{0, 1, blockSize - 1, blockSize, blockSize + 1, 3*blockSize + 17} {
		for _, header := range [][]byte{nil, []byte("h"), payload(1, MaxHeaderBytes)} {
			fs, data := newMem(1), payload(2, size)
			w, err := Create(fs, testDir, "a", header, 1)
			if err != nil {
				t.Fatal(err)
			}
			for at, piece := 0, 1; at < size; piece = piece*3 + 1 {
				n, err := w.Write(data[at:min(at+piece, size)])
				if err != nil {
					t.Fatal(err)
				}
				at += n
				if w.Size() != int64(at) {
					t.Fatalf("Size is %d after %d bytes", w.Size(), at)
				}
				if err := w.Sync(); err != nil {
					t.Fatal(err)
				}
			}
			if names := listed(t, fs); len(names) != 0 {
				t.Fatalf("%v are listed before Commit", names)
			}
			if err := errors.Join(w.Commit(), w.Abort(), w.Abort()); err != nil {
				t.Fatal(err)
			}
			for _, err := range []error{w.Commit(), w.Sync(), second(w.Write([]byte("x")))} {
				if err == nil {
					t.Fatal("a Writer goes on after Commit")
				}
			}
			r, err := Open(fs, testDir, "a")
			if err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(r.Header(), header) || r.Size() != int64(size) {
				t.Fatalf("a header of %d bytes and %d of payload, should be %d and %d", len(r.Header()), r.Size(), len(header), size)
			}
			got, err := io.ReadAll(io.NewSectionReader(r, 0, r.Size()))
			if err != nil || !bytes.Equal(got, data) {
				t.Fatalf("other bytes, or %v", err)
			}
			if err := r.Close(); err != nil || fs.OpenFiles() != 0 {
				t.Fatalf("%d files are open, %v", fs.OpenFiles(), err)
			}
		}
	}
}

func second(_ int, err error) error { return err }

// TestReaderAt: the standard library's test of an io.ReaderAt, the edges, and
// readers at the same time.
func TestReaderAt(t *testing.T) {
	fs, data := newMem(1), payload(2, 1000)
	write(t, fs, "a", []byte("head"), data, 3, 64)
	r, err := Open(fs, testDir, "a")
	if err != nil {
		t.Fatal(err)
	}
	if err := iotest.TestReader(io.NewSectionReader(r, 0, r.Size()), data); err != nil {
		t.Error(err)
	}
	for _, c := range []struct {
		size int
		off  int64
		n    int
		err  error
	}{{0, 0, 0, nil}, {0, 5000, 0, nil}, {1, 1000, 0, io.EOF}, {1, 1 << 62, 0, io.EOF}, {10, 995, 5, io.EOF}, {5, 995, 5, nil}, {1001, 0, 1000, io.EOF}} {
		p := make([]byte, c.size)
		if n, err := r.ReadAt(p, c.off); n != c.n || err != c.err || n > 0 && !bytes.Equal(p[:n], data[c.off:][:n]) {
			t.Errorf("%d bytes at %d: %d, %v", c.size, c.off, n, err)
		}
	}
	if n, err := r.ReadAt(make([]byte, 1), -1); n != 0 || err == nil {
		t.Errorf("at -1: %d, %v", n, err)
	}
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(uint64(i), 1))
			for range 300 {
				off := rng.IntN(900)
				p := make([]byte, rng.IntN(100))
				if _, err := r.ReadAt(p, int64(off)); err != nil || !bytes.Equal(p, data[off:][:len(p)]) {
					t.Errorf("%d bytes at %d: other bytes, or %v", len(p), off, err)
				}
			}
		})
	}
	wg.Wait()
}

// TestReadsOnce: reading in order in small pieces reads each block once.
func TestReadsOnce(t *testing.T) {
	fs := newMem(1)
	write(t, fs, "a", nil, payload(2, 1000), 3, 64)
	r, err := Open(fs, testDir, "a")
	if err != nil {
		t.Fatal(err)
	}
	reads := 0
	fs.SetHook(func(op vfs.Op) error {
		if op.Kind == vfs.OpRead {
			reads++
		}
		return nil
	})
	if _, err := io.ReadAll(iotest.OneByteReader(io.NewSectionReader(r, 0, r.Size()))); err != nil || reads != 16 {
		t.Errorf("%d reads of 16 blocks, %v", reads, err)
	}
}

// TestDirectory: List, Clean, Remove and Create on what may be in a directory.
func TestDirectory(t *testing.T) {
	fsys := newMem(1)
	if names, err := List(fsys, testDir); len(names) != 0 || err != nil {
		t.Errorf("a missing directory: %v, %v", names, err)
	}
	if err := Clean(fsys, testDir); err != nil {
		t.Error(err)
	}
	for _, name := range []string{"b", "a", "a-b", "c.snap", "d.snap.tmp"} {
		write(t, fsys, name, nil, []byte(name), 1, 64)
	}
	for _, foreign := range []string{".snap", ".snap.tmp", "x", "x.tmp", "x.snap.old"} {
		f, err := fsys.Create(testDir + "/" + foreign)
		if err := errors.Join(err, f.Close()); err != nil {
			t.Fatal(err)
		}
	}
	for range 2 { // the second one replaces what the first one has left
		w, err := Create(fsys, testDir, "left", nil, 1)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(make([]byte, blockSize+1)); err != nil {
			t.Fatal(err)
		}
		fsys.Kill()
	}
	files, _ := fsys.List(testDir) // it exists
	if !slices.Contains(files, "left.snap.tmp") {
		t.Fatalf("no temporary file among %v", files)
	}
	want := []string{"a", "a-b", "b", "c.snap", "d.snap.tmp"}
	for range 2 {
		if names := listed(t, fsys); !slices.Equal(names, want) {
			t.Errorf("listed are %v, should be %v", names, want)
		}
		if err := Clean(fsys, testDir); err != nil {
			t.Error(err)
		}
	}
	files, _ = fsys.List(testDir)
	if slices.Contains(files, "left.snap.tmp") || len(files) != len(want)+5 {
		t.Errorf("after Clean there are %v", files)
	}
	if err := Remove(fsys, testDir, "a-b"); err != nil || slices.Contains(listed(t, fsys), "a-b") {
		t.Errorf("a-b was not removed: %v", err)
	}
	if err := Remove(fsys, testDir, "a-b"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("removing it again: %v", err)
	}
	if _, err := Open(fsys, testDir, "a-b"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("opening it: %v", err)
	}
	for _, name := range []string{"", "a/b", `a\b`, "../a"} {
		_, err1 := Create(fsys, testDir, name, nil, 1)
		_, err2 := Open(fsys, testDir, name)
		if err1 == nil || err2 == nil || Remove(fsys, testDir, name) == nil {
			t.Errorf("the name %q is taken", name)
		}
	}
	if _, err := Create(fsys, testDir, "h", make([]byte, MaxHeaderBytes+1), 1); err == nil {
		t.Error("a header that Open would refuse is taken")
	}
	if n := fsys.OpenFiles(); n != 0 {
		t.Errorf("%d files are open", n)
	}
}

// TestLateAbort: Abort of a Writer that has ended does not touch the next one.
func TestLateAbort(t *testing.T) {
	fs := newMem(1)
	var before []*Writer
	for _, end := range []func(*Writer) error{(*Writer).Commit, (*Writer).Abort, (*Writer).Commit} {
		w, err := Create(fs, testDir, "a", nil, 1)
		if err != nil {
			t.Fatal(err)
		}
		for _, b := range before {
			if err := b.Abort(); err != nil {
				t.Fatal(err)
			}
		}
		if err := end(w); err != nil {
			t.Fatal(err)
		}
		before = append(before, w)
	}
	if _, _, err := read(fs, "a"); err != nil {
		t.Error(err)
	}
}

// TestRemoveWhileOpen: a Reader goes on after its snapshot has been removed or
// replaced, on the real file system too.
func TestRemoveWhileOpen(t *testing.T) {
	data := payload(2, 3*blockSize)
	dir := t.TempDir()
	for _, then := range []func() error{
		func() error { return Remove(vfs.OS(), dir, "a") },
		func() error {
			w, err := Create(vfs.OS(), dir, "a", nil, 1)
			if err != nil {
				return err
			}
			return w.Commit()
		},
	} {
		w, err := Create(vfs.OS(), dir, "a", []byte("head"), 1)
		if err != nil {
			t.Fatal(err)
		}
		_, err = w.Write(data)
		if err := errors.Join(err, w.Commit()); err != nil {
			t.Fatal(err)
		}
		r, err := Open(vfs.OS(), dir, "a")
		if err != nil {
			t.Fatal(err)
		}
		if err := then(); err != nil {
			t.Fatal(err)
		}
		got := make([]byte, len(data))
		if _, err := r.ReadAt(got, 0); err != nil || !bytes.Equal(got, data) {
			t.Errorf("other bytes, or %v", err)
		}
		if err := r.Close(); err != nil {
			t.Error(err)
		}
	}
}

// TestEqualBytes: the same salt gives the same file, another one another file.
func TestEqualBytes(t *testing.T) {
	fs := newMem(1)
	write(t, fs, "a", []byte("h"), payload(1, 200), 5, 64)
	write(t, fs, "b", []byte("h"), payload(1, 200), 5, 64)
	write(t, fs, "c", []byte("h"), payload(1, 200), 6, 64)
	if !bytes.Equal(fileOf(t, fs, "a"), fileOf(t, fs, "b")) {
		t.Error("the same salt, and other bytes")
	}
	if bytes.Equal(fileOf(t, fs, "a"), fileOf(t, fs, "c")) {
		t.Error("another salt, and the same bytes")
	}
}

func fileOf(t testing.TB, fs vfs.FS, name string) []byte {
	t.Helper()
	f, err := fs.Open(testDir + "/" + name + suffix)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	size, err := f.Size()
	if err != nil {
		t.Fatal(err)
	}
	b := make([]byte, size)
	if _, err := f.ReadAt(b, 0); err != nil {
		t.Fatal(err)
	}
	return b
}

// setFile gives a snapshot any bytes.
func setFile(t testing.TB, fs vfs.FS, name string, b []byte) {
	t.Helper()
	if err := fs.MkdirAll(testDir); err != nil {
		t.Fatal(err)
	}
	path := testDir + "/" + name + suffix
	f, err := fs.Open(path)
	if err != nil {
		f, err = fs.Create(path)
	}
	if err != nil {
		t.Fatal(err)
	}
	err = f.Truncate(0)
	if err == nil && len(b) > 0 {
		_, err = f.WriteAt(b, 0)
	}
	if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
		t.Fatal(err)
	}
}
