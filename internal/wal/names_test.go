package wal

import (
	"errors"
	"strings"
	"testing"

	"example.com/raft/internal/vfs"
)

// A process is killed after a released segment was renamed to a spare and before
// the directory was synced. The next one must be sure of the names before it
// writes into any file: a power cut could give the spare its old name back, with
// another header in it. (Simulator, seed 99003484.)
func TestNamesAreCertainBeforeWrites(t *testing.T) {
	for seed := uint64(1); seed <= 5; seed++ {
		fs := newMem(seed)
		o := testOptions(fs, seed)
		l, _ := mustOpen(t, o)
		killed := errors.New("killed")
		renamed := false
		fs.SetHook(func(op vfs.Op) error {
			if op.Kind == vfs.OpRename && strings.HasSuffix(op.Name, segmentSuffix) {
				renamed = true
				return nil
			}
			if renamed {
				return killed
			}
			return nil
		})
		for n := 0; !renamed && n < 200; n++ {
			last := l.Append(numbered(n, 1500))
			if err := l.Flush(); err != nil {
				break
			}
			l.Release(last)
			_ = l.Prepare() // it fails when the process is killed
		}
		if !renamed {
			t.Fatal("no segment was recycled")
		}
		fs.SetHook(nil)
		l.Close() // what it writes is lost with the process
		fs.Kill()
		synced, wrote := false, false
		fs.SetHook(func(op vfs.Op) error {
			synced = synced || op.Kind == vfs.OpSyncDir && op.Name == o.Dir
			if op.Kind == vfs.OpWrite && !synced {
				wrote = true
			}
			return nil
		})
		again, _ := mustOpen(t, o)
		fs.SetHook(nil)
		if wrote || !synced {
			t.Errorf("seed %d: Open wrote into a file before it had synced the names of all (synced: %v)", seed, synced)
		}
		again.Close()
	}
}

// A header says that the file was filled (rule 3 of writing), so it is written
// only when all that filled it is durable: a power cut that lets the header
// through and not the zeros would leave a segment whose space nobody has claimed.
func TestHeaderComesAfterFilling(t *testing.T) {
	for _, blocks := range []int{4, 64, 1 << 10, 1<<10 + 1} { // 4 MiB are synced on the way
		fs := newMem(1)
		o := testOptions(fs, 1)
		o.MinSegmentBytes, o.MaxSegmentBytes = blocks*blockSize, blocks*blockSize
		filled := map[string]int{} // bytes written and not synced, by file
		headers := 0
		fs.SetHook(func(op vfs.Op) error {
			switch {
			case op.Kind == vfs.OpWrite && op.Size == blockSize && op.Offset == 0:
				if headers++; filled[op.Name] > 0 {
					t.Errorf("%d blocks: the header of %s is written while %d bytes of zeros are not durable", blocks, op.Name, filled[op.Name])
				}
			case op.Kind == vfs.OpWrite:
				filled[op.Name] += op.Size
			case op.Kind == vfs.OpSync:
				filled[op.Name] = 0
			}
			return nil
		})
		l, _ := mustOpen(t, o)
		fs.SetHook(nil)
		if l.Close(); headers == 0 {
			t.Errorf("%d blocks: no header was written", blocks)
		}
	}
}
