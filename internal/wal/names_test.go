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
