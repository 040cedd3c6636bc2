package wal

import (
	"errors"
	"fmt"
	"testing"

	"example.com/raft/internal/vfs"
)

// BenchmarkFlush appends and flushes on a real file system, under TMPDIR.
// The log is released as it grows, so that the steady state
// with recycled segments is measured.
func BenchmarkFlush(b *testing.B) {
	for _, c := range []struct{ size, perFlush int }{
		{128, 1}, {128, 16}, {128, 256}, {128, 1024}, {64 << 10, 1}, {64 << 10, 16}, {64 << 10, 256},
	} {
		b.Run(fmt.Sprintf("size=%d/perFlush=%d", c.size, c.perFlush), func(b *testing.B) {
			l, err := Open(b.Context(), Options{FS: vfs.OS(), Dir: b.TempDir() + "/log"}, func(LSN, Record) error { return nil })
			if err != nil {
				b.Fatal(err)
			}
			data := make([]byte, c.size)
			for i := range data {
				data[i] = byte(i)
			}
			round := func(n int, data []byte) {
				for range n {
					l.Append(Record{Kind: 2, Data: data})
				}
				if err := l.Flush(); err != nil {
					b.Fatal(err)
				}
				if at := l.Durable(); at > 64<<20 {
					l.Release(at - 64<<20)
				}
			}
			large := make([]byte, 64<<10)
			for l.Durable() < 400<<20 { // until segments are recycled
				round(64, large)
			}
			b.SetBytes(int64(c.size * c.perFlush))
			b.ReportAllocs()
			n := 0
			for b.Loop() {
				round(c.perFlush, data)
				n++
			}
			b.StopTimer()
			b.ReportMetric(float64(n*c.perFlush)/b.Elapsed().Seconds(), "records/s")
			if err := l.Close(); err != nil {
				b.Fatal(err)
			}
		})
	}
}

// BenchmarkPump is the ceiling: whole blocks written and synced into a file
// that is full of zeros, with nothing around.
func BenchmarkPump(b *testing.B) {
	for _, size := range []int{4 << 10, 40 << 10, 148 << 10, 1 << 20, 16 << 20} {
		b.Run(fmt.Sprintf("bytes=%d", size), func(b *testing.B) {
			f, err := vfs.OS().Create(b.TempDir() + "/f")
			if err != nil {
				b.Fatal(err)
			}
			const fileSize = 64 << 20
			zeros := make([]byte, 1<<20)
			for off := int64(0); off < fileSize; off += 1 << 20 {
				if _, err := f.WriteAt(zeros, off); err != nil {
					b.Fatal(err)
				}
			}
			if err := f.Sync(); err != nil {
				b.Fatal(err)
			}
			data := make([]byte, size)
			for i := range data {
				data[i] = byte(i)
			}
			b.SetBytes(int64(size))
			b.ReportAllocs()
			b.ResetTimer()
			off := int64(0)
			for range b.N {
				if off+int64(size) > fileSize {
					off = 0
				}
				_, err := f.WriteAt(data, off)
				if err := errors.Join(err, f.Sync()); err != nil {
					b.Fatal(err)
				}
				off += int64(size)
			}
			b.StopTimer()
			if err := f.Close(); err != nil {
				b.Fatal(err)
			}
		})
	}
}

// BenchmarkAppend is the cost of copying a record into the buffer.
func BenchmarkAppend(b *testing.B) {
	l, err := Open(b.Context(), testOptions(newMem(1), 1), func(LSN, Record) error { return nil })
	if err != nil {
		b.Fatal(err)
	}
	data := make([]byte, 128)
	b.ReportAllocs()
	for i := range b.N {
		l.Append(Record{Kind: 2, Data: data})
		if i%8192 == 0 {
			b.StopTimer()
			if err := l.Flush(); err != nil {
				b.Fatal(err)
			}
			l.Release(l.Durable())
			if err := l.Prepare(); err != nil {
				b.Fatal(err)
			}
			b.StartTimer()
		}
	}
}
