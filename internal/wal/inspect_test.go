package wal

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"testing"

	"example.com/raft/internal/vfs"
)

// inspected runs Inspect, which may change nothing, and returns a check that
// Open has found the same. It looks at a copy, so that what the caller has asked
// the file system to do, to fail for example, is done to Open.
func inspected(o Options) (same func(k *kept, err error) error) {
	before := &kept{}
	mem := o.FS.(*vfs.Mem).Clone()
	o.FS = mem
	changed := ""
	mem.SetHook(func(op vfs.Op) error {
		if op.Kind.Changes() || op.Kind == vfs.OpLock {
			changed = fmt.Sprintf("Inspect does %+v", op)
		}
		return nil
	})
	inspectErr := Inspect(context.Background(), o, before.replay)
	if mem.OpenFiles() != 0 {
		changed = "Inspect leaves files open"
	}
	return func(k *kept, err error) error {
		if changed != "" {
			return errors.New(changed)
		}
		if errors.Is(inspectErr, fs.ErrNotExist) {
			inspectErr = nil // Open makes one
		}
		if inspectErr == nil && err != nil && !refusal(err) {
			return nil // it has failed at something that Inspect does not do
		}
		if fmt.Sprint(inspectErr) != fmt.Sprint(err) {
			return fmt.Errorf("Inspect says %v, and Open %v", inspectErr, err)
		}
		equal := func(a, b Record) bool {
			return a.Kind == b.Kind && a.Group == b.Group && string(a.Data) == string(b.Data)
		}
		if err == nil && (!slices.Equal(before.lsns, k.lsns) || !slices.EqualFunc(before.recs, k.recs, equal)) {
			return fmt.Errorf("Inspect has given %d records, and Open %d", len(before.recs), len(k.recs))
		}
		return nil
	}
}

// refusal tells whether an error says that what is on disk is not accepted.
func refusal(err error) bool {
	var corrupt *CorruptError
	var version *VersionError
	var tag *TagError
	return errors.As(err, &corrupt) || errors.As(err, &version) || errors.As(err, &tag)
}

// TestInspectMissing: a directory that does not exist is not made.
func TestInspectMissing(t *testing.T) {
	o := testOptions(newMem(1), 1)
	k := &kept{}
	if err := Inspect(context.Background(), o, k.replay); !errors.Is(err, fs.ErrNotExist) || len(k.recs) > 0 {
		t.Errorf("%v", err)
	}
	if err := Inspect(context.Background(), Options{}, k.replay); err == nil {
		t.Error("no directory is named, and none is missed")
	}
	if names, err := o.FS.List("/"); err != nil || len(names) > 0 {
		t.Errorf("%v, %v", names, err)
	}
}
