package wal

import (
	"context"
	"encoding/binary"
	"errors"
	"testing"

	"example.com/raft/internal/vfs"
)

// FuzzOpen opens a log whose segment files hold anything. With fix it makes
// the checksums of headers right first, so that the fuzzer gets past them.
// Open must not panic, must not change what it refuses, and what it accepts
// must be the same when opened again.
//
// More than 70 lines: seeds, repair and checks share the layout of the files.
func FuzzOpen(f *testing.F) {
	for _, sealed := range []bool{true, false} {
		fs, m := fuzzLog(f, sealed)
		var files [2][]byte
		for i := range files {
			files[i] = readAll(f, fs, m.Dir+"/"+fileName(uint64(i+1), segmentSuffix))
		}
		f.Add(files[0], files[1], false)
		f.Add(files[0], files[1], true)
		f.Add(files[0], []byte{}, false)
		f.Add(files[0][:3*blockSize], files[1], true)
	}
	f.Add([]byte{}, []byte{}, true)
	f.Fuzz(func(t *testing.T, a, b []byte, fix bool) {
		fs := newMem(1)
		o := testOptions(fs, 1)
		if err := fs.MkdirAll(o.Dir); err != nil {
			t.Fatal(err)
		}
		for i, p := range [][]byte{a, b} {
			if i > 0 && len(p) == 0 || len(p) > 1<<20 {
				break
			}
			p = append([]byte(nil), p...)
			if fix {
				fixChecksums(p)
			}
			writeAll(t, fs, o.Dir+"/"+fileName(uint64(i+1), segmentSuffix), p)
		}
		k := &kept{}
		changes := 0
		fs.SetHook(func(op vfs.Op) error {
			if op.Kind.Changes() && op.Kind != vfs.OpSyncDir {
				changes++
			}
			return nil
		})
		l, err := Open(context.Background(), o, k.replay)
		if err != nil {
			var ce *CorruptError
			var ve *VersionError
			var te *TagError
			if !errors.As(err, &ce) && !errors.As(err, &ve) && !errors.As(err, &te) {
				t.Fatalf("an untyped error: %v", err)
			}
			if changes > 0 {
				t.Fatalf("%d changes on disk, and then: %v", changes, err)
			}
			return
		}
		for i, lsn := range k.lsns {
			if lsn == 0 {
				continue
			}
			if r, err := l.ReadAt(lsn, nil); err != nil || string(r.Data) != string(k.recs[i].Data) {
				t.Fatalf("ReadAt(%d) differs from replay: %v", lsn, err)
			}
		}
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
		l, again := mustOpen(t, o)
		if len(again.recs) != len(k.recs) {
			t.Fatalf("%d records, and %d when opened again", len(k.recs), len(again.recs))
		}
		for i, r := range again.recs {
			if string(r.Data) != string(k.recs[i].Data) {
				t.Fatalf("record %d differs when opened again", i)
			}
		}
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
	})
}

// fuzzLog is a log of two segments.
func fuzzLog(t testing.TB, sealed bool) (*vfs.Mem, Options) {
	fs := newMem(1)
	o := testOptions(fs, 1)
	l, _ := mustOpen(t, o)
	for n := 0; len(l.segs) < 2; n++ {
		r := numbered(n, 30)
		if n == 0 {
			r.Kind = kindState
		}
		l.Append(r)
		if err := l.Flush(); err != nil {
			t.Fatal(err)
		}
	}
	if sealed {
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
	}
	return fs, o
}

// fixChecksums makes the checksums of a segment's headers and records right,
// as far as their structure allows, and gives every batch the segment's salt.
func fixChecksums(p []byte) {
	if len(p) < blockSize {
		return
	}
	copy(p[8:12], le32(checksum(0, p[12:blockSize])))
	h, wrong := decodeSegmentHeader(p)
	if wrong != "" {
		return
	}
	for off := blockSize; off+batchHeaderSize <= len(p); off += blockSize {
		b := p[off:]
		if string(b[:4]) != batchMagic {
			continue
		}
		bh := batchHeader{
			version: b[36], flags: b[37], salt: h.salt,
			seq: u64(b[16:]), prev: link{u64(b[24:]), u32(b[32:])},
			carried: u32(b[40:]), records: u32(b[44:]),
			carriedCRC: u32(b[48:]), recordsCRC: u32(b[52:]),
		}
		if total := int64(bh.carried) + int64(bh.records); total <= int64(len(b)-batchHeaderSize) {
			body := b[batchHeaderSize:][:total]
			bh.carriedCRC = fixRecords(body[:bh.carried])
			bh.recordsCRC = fixRecords(body[bh.carried:])
		}
		bh.encode(b, int64(off))
	}
}

func fixRecords(body []byte) (heads uint32) {
	for len(body) >= recordHeadSize {
		n := u32(body)
		if int64(n) > int64(len(body)-recordHeadSize) {
			break
		}
		end := recordHeadSize + int(n)
		copy(body[4:8], le32(recordChecksum(body, body[recordHeadSize:end])))
		heads = checksum(heads, body[:recordHeadSize])
		body = body[end:]
	}
	return heads
}

func readAll(t testing.TB, fs vfs.FS, name string) []byte {
	f, err := fs.Open(name)
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

func writeAll(t testing.TB, fs vfs.FS, name string, p []byte) {
	f, err := fs.Create(name)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	_, err = f.WriteAt(p, 0)
	if err := errors.Join(err, f.Sync()); err != nil {
		t.Fatal(err)
	}
}

func u32(b []byte) uint32  { return binary.LittleEndian.Uint32(b) }
func u64(b []byte) uint64  { return binary.LittleEndian.Uint64(b) }
func le32(v uint32) []byte { return binary.LittleEndian.AppendUint32(nil, v) }
