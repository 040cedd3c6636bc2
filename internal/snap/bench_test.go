package snap

import (
	"errors"
	"io"
	"os"
	"testing"

	"example.com/raft/internal/vfs"
)

const benchSize = 64 << 20

// BenchmarkWrite writes 64 MiB in pieces of 64 KiB on a real file system,
// under TMPDIR: as a snapshot, and as a plain file that is synced.
func BenchmarkWrite(b *testing.B) {
	piece := payload(1, 64<<10)
	b.Run("snap", func(b *testing.B) {
		dir := b.TempDir()
		b.SetBytes(benchSize)
		for b.Loop() {
			w, err := Create(vfs.OS(), dir, "a", nil, 1)
			for n := 0; err == nil && n < benchSize; n += len(piece) {
				_, err = w.Write(piece)
			}
			if err == nil {
				err = w.Commit()
			}
			if err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("plain", func(b *testing.B) {
		name := b.TempDir() + "/plain"
		b.SetBytes(benchSize)
		for b.Loop() {
			f, err := os.Create(name + ".tmp")
			for n := 0; err == nil && n < benchSize; n += len(piece) {
				_, err = f.Write(piece)
			}
			if err := errors.Join(err, f.Sync(), f.Close(), os.Rename(name+".tmp", name)); err != nil {
				b.Fatal(err)
			}
		}
	})
}

// BenchmarkRead reads 64 MiB in pieces of 64 KiB, which are in the system's
// cache.
func BenchmarkRead(b *testing.B) {
	dir := b.TempDir()
	data := payload(1, benchSize)
	w, err := Create(vfs.OS(), dir, "a", nil, 1)
	if err != nil {
		b.Fatal(err)
	}
	_, err = w.Write(data)
	if err := errors.Join(err, w.Commit(), os.WriteFile(dir+"/plain", data, 0o600)); err != nil {
		b.Fatal(err)
	}
	piece := make([]byte, 64<<10)
	all := func(b *testing.B, r io.ReaderAt) {
		for off := int64(0); off < benchSize; off += int64(len(piece)) {
			if _, err := r.ReadAt(piece, off); err != nil {
				b.Fatal(err)
			}
		}
	}
	b.Run("snap", func(b *testing.B) {
		b.SetBytes(benchSize)
		for b.Loop() {
			r, err := Open(vfs.OS(), dir, "a")
			if err != nil {
				b.Fatal(err)
			}
			all(b, r)
			if err := r.Close(); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("plain", func(b *testing.B) {
		b.SetBytes(benchSize)
		for b.Loop() {
			f, err := os.Open(dir + "/plain")
			if err != nil {
				b.Fatal(err)
			}
			all(b, f)
			if err := f.Close(); err != nil {
				b.Fatal(err)
			}
		}
	})
}
