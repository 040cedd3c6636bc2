package wal

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
)

// Inspect calls replay for what the log in a directory holds, as Open does, and
// changes nothing, so it proves nothing durable either. Nobody may have the log
// open. Errors are those of Open; a missing directory gives one that matches
// fs.ErrNotExist.
func Inspect(ctx context.Context, o Options, replay func(LSN, Record) error) error {
	if err := o.defaults(); err != nil {
		return err
	}
	names, err := o.FS.List(o.Dir)
	if o.Begun && errors.Is(err, fs.ErrNotExist) {
		return lost(o.Dir)
	}
	if err != nil {
		return fmt.Errorf("wal: list the log's directory: %w", err)
	}
	r := &recovery{l: &Log{o: o, carry: newCarry(o.Carry)}, ctx: ctx, replay: replay}
	errs := []error{r.read(names)}
	for _, seg := range r.segs {
		errs = append(errs, seg.file.Close())
	}
	return errors.Join(errs...)
}
